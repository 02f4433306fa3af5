"""Checks of what the groups `reward` and `teacher` serve: models beside the policy."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_rl.recipe.extensions import UnknownExtension, is_served
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import KeyPath

Found = Iterator[tuple[KeyPath, str]]


def check_scoring(recipe: Recipe) -> Found:
    """Groups without a model to serve, and limits that mean nothing there."""
    served = [index for index, item in enumerate(recipe.reward) if _served(item)]
    for index in served:
        if "memory_gb" in recipe.reward[index]:
            text = "bounds scorer processes; this reward is a model of the reward group: remove it"
            yield ("reward", index, "memory_gb"), text
    if recipe.cluster.reward is not None and not served:
        text = "no reward of this recipe is a model: remove it, or add one such as {name: model, path: ...}"
        yield ("cluster", "reward"), text
    if recipe.cluster.teacher is not None and recipe.teacher is None:
        yield ("cluster", "teacher"), "this recipe has no teacher: remove it, or say teacher.path"
    distils = recipe.algorithm.get("name") == "distill"
    if recipe.kind == "rl" and distils and recipe.teacher is None:
        text = "is 'distill', which learns from a model beside the policy: say teacher.path"
        yield ("algorithm", "name"), text
    if recipe.kind == "rl" and recipe.teacher is not None and not distils and not recipe.plugins:
        text = f"algorithm {recipe.algorithm.get('name')} asks no teacher; use distill, or remove the section"
        yield ("teacher",), text
    if recipe.teacher is not None and recipe.kind != "rl":
        yield ("teacher",), f"kind {recipe.kind} has no teacher; on-policy distillation is kind rl"


def _served(item: dict[str, object]) -> bool:
    try:
        return is_served(item)
    except (UnknownExtension, ImportError, TypeError):  # said where the reward is
        return False
