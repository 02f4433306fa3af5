"""DAPO's soft overlong punishment: a response that nears the length limit is worth less, smoothly."""

from __future__ import annotations

from typing import Any

from hpc_rl.rewards.base import SampleInfo
from hpc_rl.rewards.config import OverlongConfig


class Overlong:
    """Reward `overlong`."""

    def __init__(self, config: OverlongConfig) -> None:
        self.config = config

    def score(
        self,
        prompt: str,
        response: str,
        answer: str | None,
        fields: dict[str, Any],
        sample: SampleInfo | None = None,
    ) -> float:
        """Between -penalty and 0 (arXiv 2503.14476, eq. 13), by the tokens that were sampled."""
        if sample is None:
            raise ValueError("reward overlong needs the number of sampled tokens")
        limit = self.config.max_tokens or sample.max_tokens
        buffer = self.config.buffer
        if buffer > limit:
            raise ValueError(f"reward overlong: buffer {buffer} is larger than the limit of {limit} tokens")
        over = sample.tokens - (limit - buffer)
        return -self.config.penalty * min(1.0, max(0.0, over / buffer))
