"""A reward for the shape of the response: a regular expression is found in it."""

from __future__ import annotations

import re
from typing import Any

from hpc_rl.rewards.config import FormatConfig


class Format:
    """Reward `format`."""

    def __init__(self, config: FormatConfig) -> None:
        self._pattern = re.compile(config.pattern)

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        return float(self._pattern.search(response) is not None)
