"""What a reward is, and how the recipe's rewards become objects.

A reward is either a class, made from its pydantic config and having `score`, or a plain function with
the signature of `score`; both may be `async`. Rewards run in scorer processes only (`scorer.py`), never
in the engine's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable
from numbers import Real
from typing import Any, Protocol

import msgspec

from hpc_rl.recipe.extensions import REWARD_KEYS, is_served, registry
from hpc_rl.rewards.config import row_needs

LIMIT_S = 30.0
MODEL_LIMIT_S = 120.0  # of a batch, which may be long texts or a judge's whole replies
MEMORY_GB = 8.0


class SampleInfo(msgspec.Struct, frozen=True):
    """What the sampler knows of a response: its length in tokens (the end token counted), why it ended
    (`stop` or `length`), and how many tokens it might have had."""

    tokens: int
    finish: str
    max_tokens: int


Value = float | Awaitable[float]
Score = Callable[..., Value]


class Reward(Protocol):
    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> Value:
        """How good `response` is. `answer` is the row's verifiable answer, `fields` its other columns.

        One that has a further parameter `sample` is given the `SampleInfo` there.
        """
        ...


class RewardError(ValueError):
    """A reward cannot be made, or gave something that is no finite number."""


class RewardSpec(msgspec.Struct, frozen=True):
    """One item of the recipe's `reward` list. `key` names it in metrics and is unique; `limit_s` is how long
    it may take for a sample, `memory_gb` what its process may hold (the largest of a recipe counts; none:
    MEMORY_GB)."""

    key: str
    name: str
    weight: float
    options: dict[str, Any] = {}
    limit_s: float = LIMIT_S
    memory_gb: float | None = None


def reward_specs(sections: list[dict[str, Any]]) -> list[RewardSpec]:
    """The recipe's `reward` list; a name used twice gets the key `name_2`. A function that is given by
    `python` is called by its own name."""
    specs: list[RewardSpec] = []
    for section in sections:
        options = {k: v for k, v in section.items() if k not in ("name", *REWARD_KEYS)}
        name = str(section["name"])
        base = str(options["function"]).rpartition(":")[2] if name == "python" else name
        key, count = base, 1
        while any(spec.key == key for spec in specs):
            count += 1
            key = f"{base}_{count}"
        weight = float(section.get("weight", 1.0))
        # `code` bounds itself and should get to its own end, which cleans up.
        usual = LIMIT_S if name != "code" else max(LIMIT_S, float(options.get("total_s", 0.0)) + 10.0)
        usual = MODEL_LIMIT_S if _known(name) and is_served(section) else usual
        limit_s, memory_gb = float(section.get("limit_s", usual)), section.get("memory_gb")
        specs.append(RewardSpec(key, name, weight, options, limit_s, memory_gb))
    return specs


def _known(name: str) -> bool:
    """A plugin's reward is known where the plugin is imported, which is the scorer's process at the latest:
    it says of a name that is no reward what there is."""
    return name in registry("rewards").names()


def make_reward(spec: RewardSpec) -> Score:
    """The scoring function of `spec`. Raises UnknownExtension, RecipeError or RewardError."""
    members = registry("rewards")
    made: Any = members.load(spec.name)
    if inspect.isclass(made):
        made = made(members.config(spec.name, dict(spec.options))).score
    if not callable(made):
        raise RewardError(f"reward {spec.name!r} is {type(made).__name__}; it must be a class or a function")
    return with_sample(made)


def with_sample(function: Callable[..., Value]) -> Score:
    """`function`, told of the sample if it has a parameter of that name."""
    told = "sample" in inspect.signature(function).parameters

    def score(
        prompt: str,
        response: str,
        answer: str | None,
        fields: dict[str, Any],
        sample: SampleInfo | None = None,
    ) -> Value:
        if told:
            return function(prompt, response, answer, fields, sample=sample)
        return function(prompt, response, answer, fields)

    return score


def checked(spec: RewardSpec, value: Any) -> float:
    """`value` as a float. Raises RewardError unless it is a finite number."""
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise RewardError(f"reward {spec.key!r} gave {value!r}; it must be a finite number")


def row_checker(sections: list[dict[str, Any]]) -> Callable[[str | None, dict[str, Any]], str | None]:
    """A function that says why the recipe's rewards cannot score a row with this answer and these columns
    (None: they can): what `check` asks before the queue.

    `sections` is the validated `reward` list. Rewards of plugins are not asked: what they need is unknown.
    """
    members = registry("rewards")
    configs = [(spec.key, members.config(spec.name, dict(spec.options))) for spec in reward_specs(sections)]

    def problem(answer: str | None, fields: dict[str, Any]) -> str | None:
        for key, config in configs:
            need = row_needs(config, answer, fields)
            if need is not None:
                return f"reward {key!r} {need}"
        return None

    return problem
