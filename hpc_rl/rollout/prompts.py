"""From a prompt's content to token ids, and from sampled ids back to text.

The beginning-of-sequence token comes exactly once: chat templates and tokenizers may both add it, and
so may the text itself. Token ids are what every engine gets; no engine tokenises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_rl.data.encode import encode_prompt
from hpc_rl.data.errors import DataError
from hpc_rl.data.templates import ChatTemplate
from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.rollout.engine import PromptError


class PromptCodec:
    """A tokenizer with the rules of `data/encode.py`, which SFT shares."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template = ChatTemplate.of_tokenizer(tokenizer)

    @classmethod
    def load(cls, path: str, revision: str | None, trust_remote_code: bool) -> PromptCodec:
        from transformers import AutoTokenizer

        return cls(
            AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        )

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    def encode(
        self, content: str | list[dict[str, Any]], spec: DatasetSpec, tools: list[Any] | None = None
    ) -> list[int]:
        """Token ids of a prompt, whose chat template is given `tools`.

        Raises PromptError where a chat template is missing or refuses."""
        try:
            if isinstance(content, list) and self._template is not None:
                content = self._template.prepared(content)  # templates of vision models may print parts alone
            return self._once(encode_prompt(self._tokenizer, content, spec, tools))
        except DataError as error:
            raise PromptError(str(error)) from error

    def _once(self, ids: list[int]) -> list[int]:
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        # Some tokenizers close every text; a prompt must stay open.
        if len(ids) > 1 and eos is not None and eos != bos and ids[-1] == eos and self._adds_eos():
            ids = ids[:-1]
        if not ids:
            raise PromptError("the prompt has no tokens")
        return ids

    def _adds_eos(self) -> bool:
        return bool(self._tokenizer("a")["input_ids"][-1] == self._tokenizer.eos_token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


def prompt_text(content: str | list[dict[str, Any]]) -> str:
    """What rewards are told of a prompt: its text, or that of the last user message (without media)."""
    if isinstance(content, str):
        return content
    for message in reversed(content):
        if message.get("role") != "user":
            continue
        told = message.get("content") or ""
        parts = [told] if isinstance(told, str) else [p["text"] for p in told if p.get("type") == "text"]
        return "".join(parts)
    return ""
