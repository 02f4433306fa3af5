"""What a reward is, and how the recipe's rewards become objects.

A reward is either a class, made from its pydantic config and having `score`, or a plain function with
the signature of `score`. Rewards run in scorer processes only (`scorer.py`), never in the engine's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from hpc_rl.recipe.extensions import registry

Score = Callable[[str, str, str | None, dict[str, Any]], float]


class Reward(Protocol):
    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        """How good `response` is. `answer` is the row's verifiable answer, `fields` its other columns."""
        ...


class RewardError(ValueError):
    """A reward cannot be made, or gave something that is no finite number."""


class RewardSpec(msgspec.Struct, frozen=True):
    """One item of the recipe's `reward` list. `key` names it in metrics and is unique."""

    key: str
    name: str
    weight: float
    options: dict[str, Any] = {}


def reward_specs(sections: list[dict[str, Any]]) -> list[RewardSpec]:
    """The recipe's `reward` list; a name used twice gets the key `name_2`."""
    specs: list[RewardSpec] = []
    for section in sections:
        options = {k: v for k, v in section.items() if k not in ("name", "weight")}
        name = str(section["name"])
        count = sum(spec.name == name for spec in specs)
        key = name if count == 0 else f"{name}_{count + 1}"
        specs.append(RewardSpec(key, name, float(section.get("weight", 1.0)), options))
    return specs


def make_reward(spec: RewardSpec) -> Score:
    """The scoring function of `spec`. Raises UnknownExtension, RecipeError or RewardError."""
    members = registry("rewards")
    made: Any = members.load(spec.name)
    if inspect.isclass(made):
        reward: Reward = made(members.config(spec.name, dict(spec.options)))  # type: ignore[call-arg, assignment]
        return reward.score
    if not callable(made):
        raise RewardError(f"reward {spec.name!r} is {type(made).__name__}; it must be a class or a function")
    function: Score = made
    return function


def checked(spec: RewardSpec, value: Any) -> float:
    """`value` as a float. Raises RewardError unless it is a finite number."""
    if isinstance(value, (bool, int, float)) and math.isfinite(value):
        return float(value)
    raise RewardError(f"reward {spec.key!r} gave {value!r}; it must be a finite number")
