"""A judge: a causal model is asked about an answer, and what it replies is the reward."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc_rl.bus import messages as m
from hpc_rl.rewards.model import ModelConfig
from hpc_rl.scoring.base import ScoringError, ServedError, load_model, load_tokenizer, positions
from hpc_rl.scoring.forward import logits_at, padded


@dataclass(frozen=True)
class Question:
    """What the judge is asked, up to and with the marker of its reply."""

    ids: list[int]


class Judge:
    """`ServedReward` of `kind: judge`: one greedy reply, or one forward, per answer."""

    def __init__(self, config: ModelConfig) -> None:
        from transformers import AutoModelForCausalLM

        self.config, self.batch_tokens = config, config.batch_tokens
        self.tokenizer = load_tokenizer(config, config.tokenizer)
        self.model = load_model(AutoModelForCausalLM, config)
        self._most = config.max_length or positions(self.model)
        self._room = config.max_tokens if config.value == "number" else 0
        self._words = None if config.value == "number" else self._yes_and_no()

    def _yes_and_no(self) -> tuple[int, int]:
        """The first tokens of the two words. Raises ServedError if they are one."""
        words = (self.config.yes, self.config.no)
        yes, no = (self.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words)
        if not yes or not no or yes[0] == no[0]:
            raise ServedError(
                f"the judge's tokenizer begins {words[0]!r} and {words[1]!r} with the same token"
            )
        return yes[0], no[0]

    def open(self, request: m.ScoreAnswer) -> tuple[Question, int]:
        try:
            text = self.config.text(request.prompt, request.response, request.answer, request.fields)
        except KeyError as error:
            raise ScoringError(f"the judge's template names {error}, which the row lacks") from error
        ids = self._encode(text)
        length = len(ids) + self._room
        if self._most is not None and length > self._most:
            reply = f" with {self._room} of its reply" if self._room else ""
            raise ScoringError(f"the judge is asked {len(ids)} tokens{reply}; it takes {self._most}")
        return Question(ids), length

    def _encode(self, text: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(text)["input_ids"])
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        chat = [*system, {"role": "user", "content": text}]
        made = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        return list(made["input_ids"])

    def score(self, parts: Sequence[Question]) -> list[float]:
        rows = [part.ids for part in parts]
        if self._words is None:
            return [self._number(reply) for reply in self.replies(rows)]
        log_odds = self._log_odds(rows)
        if self.config.value == "log_odds":
            return log_odds
        return [1.0 / (1.0 + math.exp(-odds)) if odds > -700 else 0.0 for odds in log_odds]

    def _log_odds(self, rows: Sequence[list[int]]) -> list[float]:
        """log p(yes) - log p(no) as the reply's first token; the normaliser cancels."""
        assert self._words is not None
        logits = logits_at(self.model, rows, [range(len(row) - 1, len(row)) for row in rows]).float()
        yes, no = self._words
        return (logits[:, yes] - logits[:, no]).tolist()

    @torch.inference_mode()
    def replies(self, rows: Sequence[list[int]]) -> list[str]:
        """The greedy replies. Rows are padded on the left, where nothing looks."""
        width = max(len(row) for row in rows)
        where = self.model.get_input_embeddings().weight.device
        reversed_ids, reversed_mask = padded([row[::-1] for row in rows], 0, where)
        ids, mask = reversed_ids.flip(1), reversed_mask.flip(1)
        settings = self.model.generation_config
        pad = settings.pad_token_id
        if pad is None:
            ends = settings.eos_token_id
            pad = ends[0] if isinstance(ends, list) else ends
        options: dict[str, Any] = {"max_new_tokens": self.config.max_tokens, "pad_token_id": pad}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        out = self.model.generate(input_ids=ids, attention_mask=mask, **options, **greedy)
        return list(self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))

    def _number(self, reply: str) -> float:
        """The last number that the pattern finds; NaN, which is no score, where there is none."""
        found = re.findall(self.config.pattern, reply)
        if not found:
            return math.nan
        try:
            return float(found[-1])
        except ValueError:
            return math.nan
