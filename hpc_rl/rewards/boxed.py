r"""A reward for the right answer in the last `\boxed{}`, compared as a number or as text."""

from __future__ import annotations

from typing import Any

from hpc_rl.rewards.answers import final_part, last_boxed, plain_signs, reference_part, same
from hpc_rl.rewards.config import BoxedConfig
from hpc_rl.rewards.gsm8k import number_of


class Boxed:
    """Reward `boxed`."""

    def __init__(self, config: BoxedConfig) -> None:
        self.config = config

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        """1.0 or 0.0. Raises ValueError when the row has no answer: a fault of the data."""
        expected = reference_part(answer or "")
        if not expected:
            raise ValueError("reward boxed needs the row's answer, and this row has none")
        part = final_part(response)
        given = last_boxed(part)
        if given is None and self.config.fallback == "last_number":
            value = number_of(plain_signs(part), "last_number")
            given = None if value is None else format(value, "f")
        return float(given is not None and same(given, expected))
