"""A reward for the shape of the response: a regular expression, or think and answer tags."""

from __future__ import annotations

import re
from typing import Any

from hpc_rl.rewards.config import FormatConfig

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


class Format:
    """Reward `format`."""

    def __init__(self, config: FormatConfig) -> None:
        self.config = config
        self._pattern = re.compile(config.pattern)

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        if self.config.style == "pattern":
            return float(self._pattern.search(response) is not None)
        text = "<think>" + response if self.config.prefilled else response
        return float(tagged(text, answer=self.config.style == "think_answer"))


def tagged(text: str, *, answer: bool) -> bool:
    """Whether `text` is `<think>...</think>`, then `<answer>...</answer>` (without `answer`: then text):
    each tag once, none empty, nothing outside."""
    tags = TAGS if answer else TAGS[:2]
    if any(text.count(tag) != 1 for tag in tags):
        return False
    before, _, rest = text.partition("<think>")
    thought, ended, rest = rest.partition("</think>")
    if before.strip() or not ended or not thought.strip():
        return False
    if not answer:
        return bool(rest.strip())
    between, opened, rest = rest.partition("<answer>")
    given, closed, after = rest.partition("</answer>")
    return bool(opened and closed and given.strip()) and not between.strip() and not after.strip()
