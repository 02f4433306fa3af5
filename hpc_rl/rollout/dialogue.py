"""From an environment's words to token ids and from a turn's ids to its words, token-in-token-out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_rl.data.chat import as_messages
from hpc_rl.data.errors import DataError
from hpc_rl.data.observations import Observations
from hpc_rl.data.templates import ChatTemplate
from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.rollout.prompts import PromptCodec

Message = dict[str, Any]


class Dialogue:
    """A codec for episodes. Raises DataError where the model's chat template cannot carry them."""

    def __init__(self, codec: PromptCodec, tools: Sequence[dict[str, Any]]) -> None:
        tokenizer = codec.tokenizer
        template = ChatTemplate.of_tokenizer(tokenizer)
        if template is None:
            raise DataError(
                "episodes of several turns need a tokenizer with a chat template, and this one has none: set "
                "model.tokenizer to one that has"
            )
        self._codec, self._tokenizer = codec, tokenizer
        # Not all added tokens: `</tool_call>` is one in many vocabularies, and ends no turn.
        self._special = {*tokenizer.all_special_ids} | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._observations = Observations(template, tools)
        names = tokenizer.convert_ids_to_tokens(sorted(self._special))
        self._never = [name for name in names if name.strip()]

    def prompt_ids(
        self, content: str | list[Message], seen: Sequence[Message], spec: DatasetSpec
    ) -> list[int]:
        """The ids of a prompt with its tools, and what the environment showed first. Raises PromptError."""
        messages = as_messages(content, spec) if isinstance(content, str) else content
        messages, tools = self._observations.prompt([*messages, *self._cleaned(seen)])
        return self._codec.encode(messages, spec, tools)

    def observation_ids(self, messages: Sequence[Message], turn_ids: Sequence[int]) -> list[int]:
        """What follows the turn `turn_ids`: its end where the policy did not write one, the messages, and the
        beginning of the next turn. The turn itself is not looked at but for its last token."""
        text = self._observations.text(self._cleaned(messages))
        ids = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        if not turn_ids or turn_ids[-1] not in self._special or ids[0] not in self._special:
            return ids
        # Both end the turn (maybe by another token: Harmony's last), or the policy began the next one's role.
        return ids[1:] if self._observations.closes or ids[0] == turn_ids[-1] else ids

    def turn_text(self, turn_ids: Sequence[int]) -> str:
        """The words of a turn for the environment, without the token that ended it."""
        ids = list(turn_ids)
        if ids and ids[-1] in self._special:
            ids = ids[:-1]
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def _cleaned(self, messages: Sequence[Message]) -> list[Message]:
        """Without the names of special tokens: what a tool prints must not end a turn or be an image."""
        cleaned = []
        for message in messages:
            text = message["content"]
            for name in self._never:
                text = text.replace(name, "")
            cleaned.append({**message, "content": text})
        return cleaned
