"""From a prompt's content to token ids, and from sampled ids back to text.

The beginning-of-sequence token comes exactly once: chat templates and tokenizers may both add it, and
so may the text itself. Token ids are what every engine gets; no engine tokenises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_rl.rollout.engine import PromptError


class PromptCodec:
    """A tokenizer, and whether plain text is wrapped as one user message (`chat`).

    `chat` null means: if the tokenizer has a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, path: str, revision: str | None, trust_remote_code: bool) -> PromptCodec:
        from transformers import AutoTokenizer

        return cls(
            AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        )

    def encode(self, content: str | list[dict[str, Any]], chat: bool | None) -> list[int]:
        """Token ids of a prompt. Raises PromptError where the chat template refuses the messages."""
        has_template = self._tokenizer.chat_template is not None
        if isinstance(content, str):
            if not (has_template if chat is None else chat):
                return self._once(list(self._tokenizer(content)["input_ids"]))
            content = [{"role": "user", "content": content}]
        if not has_template:
            raise PromptError("the prompt is a chat, and the tokenizer has no chat template")
        try:
            text = self._tokenizer.apply_chat_template(content, add_generation_prompt=True, tokenize=False)
        except Exception as error:
            # Templates are code of the model's authors; jinja2 and whatever they raise end here.
            raise PromptError(f"the chat template refuses the messages: {error}") from error
        return self._once(list(self._tokenizer(text, add_special_tokens=False)["input_ids"]))

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
    """What rewards are told of a prompt: its text, or that of the last user message."""
    if isinstance(content, str):
        return content
    for message in reversed(content):
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            return str(message["content"])
    return ""
