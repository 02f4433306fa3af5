"""A reward for a response that contains a text."""

from __future__ import annotations

from typing import Any

from hpc_rl.rewards.config import ContainsConfig


class Contains:
    """Reward `contains`."""

    def __init__(self, config: ContainsConfig) -> None:
        self.config = config

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        wanted = self.config.text if self.config.text is not None else answer
        if wanted is None:
            raise ValueError("reward contains needs `text` in the recipe or an answer in the row")
        if self.config.ignore_case:
            return float(wanted.casefold() in response.casefold())
        return float(wanted in response)
