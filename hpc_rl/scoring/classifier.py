"""A reward model: one output of a sequence classifier for the whole chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc_rl.bus import messages as m
from hpc_rl.rewards.model import ModelConfig
from hpc_rl.scoring.base import ScoringError, ServedError, load_model, load_tokenizer, positions, text_of
from hpc_rl.scoring.forward import padded


@dataclass(frozen=True)
class Chat:
    """Token ids, and which of two texts each is from where the tokenizer counts that."""

    ids: list[int]
    types: list[int] | None


class Classifier:
    """`ServedReward` of `kind: classifier`. Rows of a batch score as they would alone."""

    def __init__(self, config: ModelConfig) -> None:
        from transformers import AutoModelForSequenceClassification

        self.batch_tokens = config.batch_tokens
        self.tokenizer = load_tokenizer(config, config.tokenizer)
        self.model = load_model(AutoModelForSequenceClassification, config)
        self._label = self._check_label(config)
        self._most = config.max_length or positions(self.model)
        self._pad = self.model.config.get_text_config().pad_token_id

    def _check_label(self, config: ModelConfig) -> int:
        names = self.model.config.id2label
        if config.label is None and len(names) > 1:
            raise ServedError(
                f"{config.path} has {len(names)} outputs ({names}); say which is the reward: label"
            )
        label = config.label or 0
        if label >= len(names):
            raise ServedError(f"{config.path} has {len(names)} outputs, and label is {label}")
        return label

    def open(self, request: m.ScoreAnswer) -> tuple[Chat, int]:
        chat = self.encode(request)
        if self._most is not None and len(chat.ids) > self._most:
            raise ScoringError(f"the chat has {len(chat.ids)} tokens; the reward model takes {self._most}")
        return chat, len(chat.ids)

    def encode(self, request: m.ScoreAnswer) -> Chat:
        """Prompt and answer through the model's own chat template; without one as a pair of texts."""
        if not self.tokenizer.chat_template:
            made = self.tokenizer(request.prompt, request.response)
            return Chat(list(made["input_ids"]), made.get("token_type_ids"))
        answer = {"role": "assistant", "content": request.response}
        chat = [*text_of(request.conversation), answer]
        return Chat(list(self.tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]), None)

    @torch.inference_mode()
    def score(self, parts: Sequence[Chat]) -> list[float]:
        config = self.model.config.get_text_config()
        if self._pad is None:
            # Transformers looks for the last token that is not the padding: one that no row has is never
            # taken for it, and with none at all only one row at a time would be allowed.
            used = {token for part in parts for token in part.ids}
            config.pad_token_id = next(token for token in range(len(used) + 1) if token not in used)
        where = self.model.get_input_embeddings().weight.device
        ids, mask = padded([part.ids for part in parts], config.pad_token_id, where)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in self.model.config.to_dict() else {}
        types = [part.types for part in parts if part.types is not None]
        if len(types) == len(parts):
            options["token_type_ids"] = padded(types, 0, where)[0]
        logits = self.model(input_ids=ids, attention_mask=mask, **options).logits
        return logits[:, self._label].float().tolist()
