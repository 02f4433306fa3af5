"""The GSM8K verifier: compares the number of the response with that of the reference answer."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from hpc_rl.rewards.answers import plain_signs
from hpc_rl.rewards.config import Gsm8kConfig

# At most 40 digits: what is longer is no answer, and huge numbers would make the comparison slow.
_NUMBER = re.compile(r"(?<!\d)[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.\d{1,40})?(?!\d)")


def number_of(text: str, where: str) -> Decimal | None:
    """The number after the last `####` (`hashes`), or the last one of `text`. None if there is none.

    A dollar sign, thousands commas, a sign and trailing text such as units are allowed.
    """
    text = plain_signs(text)
    if where == "hashes":
        _, mark, rest = text.rpartition("####")
        if not mark:
            return None
        found = _NUMBER.match(rest.lstrip().removeprefix("$").lstrip())
        return _decimal(found.group()) if found else None
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))


class Gsm8k:
    """Reward `gsm8k`."""

    def __init__(self, config: Gsm8kConfig) -> None:
        self.config = config

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        """1.0 or 0.0. Raises ValueError when the row's own answer has no number: a fault of the data."""
        if answer is None:
            raise ValueError("reward gsm8k needs the row's answer, and this row has none")
        expected = number_of(answer, self.config.reference)
        if expected is None:  # prepared data often holds the bare number
            try:
                expected = _decimal(plain_signs(answer).strip())
            except ArithmeticError as error:
                raise ValueError(f"no number in the row's answer {answer[-60:]!r}") from error
        return float(number_of(response, self.config.response) == expected)
