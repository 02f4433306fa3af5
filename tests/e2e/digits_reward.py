"""A reward that a random model earns a part of, so that losses are not zero: the share of digits."""

from __future__ import annotations

from typing import Any

from hpc_rl.recipe.extensions import register


def share_of_digits(prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
    return sum(character.isdigit() for character in response) / max(len(response), 1)


register("rewards", "digits", implementation="digits_reward:share_of_digits")
