"""A reward for the right text: the response (or a part of it) equals the row's answer."""

from __future__ import annotations

import re
from typing import Any

from hpc_rl.rewards.config import ExactConfig


class Exact:
    """Reward `exact`."""

    def __init__(self, config: ExactConfig) -> None:
        self.config = config
        self._pattern = re.compile(config.pattern) if config.pattern is not None else None

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        """1.0 or 0.0; 0.0 where the pattern is not found. Raises ValueError if the row has no answer."""
        if answer is None:
            raise ValueError("reward exact needs the row's answer, and this row has none")
        if self._pattern is not None:
            found = self._pattern.search(response)
            if found is None:
                return 0.0
            response = found.group(1) or ""
        return float(self._form(response) == self._form(answer))

    def _form(self, text: str) -> str:
        text = text.strip() if self.config.strip else text
        return text.casefold() if self.config.ignore_case else text
