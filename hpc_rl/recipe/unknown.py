"""Going on after unknown keys, so that they do not hide the other mistakes of a recipe.

The checks that follow see the recipe without them. What they find there is shown, but for what the key
that was meant would probably cure: `rolout:` is one mistake, not also a missing `rollout`.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from hpc_rl.recipe.checks import AGREE
from hpc_rl.recipe.messages import keys_at, nearest
from hpc_rl.recipe.old_names import new_name
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import KeyPath, Problem, dotted

Unknown = list[KeyPath]  # the keys that were probably meant


def without_unknown(data: dict[str, Any]) -> tuple[Recipe | None, Unknown]:
    """The recipe without its unknown keys, and what these probably meant.

    None where something else is wrong too, or a key has its name from another system: a recipe that was
    brought from there lacks so much that a second look would only add noise.
    """
    kept = json.loads(json.dumps(data))
    meant: Unknown = []
    try:
        return Recipe.model_validate_json(json.dumps(kept), strict=True), meant
    except ValidationError as error:
        details = error.errors(include_url=False)
    for detail in details:
        path: KeyPath = detail["loc"]
        if detail["type"] != "extra_forbidden" or new_name(dotted(path)) is not None:
            return None, []
        section = kept
        for part in path[:-1]:
            section = section[part]
        del section[path[-1]]
        guess = nearest(str(path[-1]), keys_at(Recipe, path[:-1]))
        meant += [(*path[:-1], guess)] if guess else []
    try:
        return Recipe.model_validate_json(json.dumps(kept), strict=True), meant
    except ValidationError:  # a section that is not whole without the key that was meant
        return None, []


def not_explained(problems: list[Problem], meant: Unknown) -> list[Problem]:
    """The problems that would be there also if the keys that were meant had been written."""
    return [problem for problem in problems if not any(_touches(problem.key, path) for path in meant)]


def _touches(key: str, path: KeyPath) -> bool:
    """Is a mistake at `key` about `path`: at it, above or below it, or at a key that must agree with it?"""
    here: KeyPath = tuple(key.split("."))
    return any(_overlap(dotted(place), dotted(path)) for place in (here, *AGREE.get(here, ())))


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
