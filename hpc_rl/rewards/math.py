r"""A reward for the right mathematical answer, by math-verify: numbers, fractions, sets, intervals, algebra.

math-verify bounds itself by alarm signals, which only a process's main thread can: scorers run rewards there.
It is imported when a scorer makes the reward, so that nothing else waits for sympy.
"""

from __future__ import annotations

import re
from typing import Any

from hpc_rl.rewards.answers import final_part, last_boxed, plain_signs, reference_part
from hpc_rl.rewards.config import MathConfig

PARSE_S = 3
COMPARE_S = 3
_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


class Math:
    """Reward `math`."""

    def __init__(self, config: MathConfig) -> None:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

        self.config = config
        self._parse, self._verify = parse, verify
        self._latex = LatexExtractionConfig(boxed_match_priority=0)
        self._plain = ExprExtractionConfig()

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        """1.0 or 0.0; what cannot be read or takes too long is 0.0. Raises ValueError when the row's own
        answer is none that math-verify reads: a fault of the data."""
        expected = self._expected(answer)
        part = plain_signs(final_part(response))
        box = last_boxed(part)
        if box is not None:
            part = rf"\boxed{{{box}}}"
        elif self.config.boxed:
            return 0.0
        given = self._parse(part, [self._latex, self._plain], parsing_timeout=PARSE_S)
        if not given:
            return 0.0
        right = self._verify(expected, given, float_rounding=self.config.digits, timeout_seconds=COMPARE_S)
        return float(right)

    def _expected(self, answer: str | None) -> list[Any]:
        """The row's answer as math-verify has it: a number where it is one, else LaTeX."""
        text = plain_signs(reference_part(answer or ""))
        if not text:
            raise ValueError("reward math needs the row's answer, and this row has none")
        if _NUMBER.fullmatch(text):  # as LaTeX, 1,234 would be a pair
            found = self._parse(text, [self._plain], parsing_timeout=PARSE_S)
        else:
            found = self._parse(rf"\boxed{{{text}}}", [self._latex], parsing_timeout=PARSE_S)
        if not found:
            raise ValueError(f"math-verify reads no answer in the row's {text[:60]!r}")
        return found
