"""Memory of the groups that serve models: weights alone, by the files that are on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpc_rl.catalog.facts import ModelFilesError, read_facts
from hpc_rl.catalog.local_models import find_model
from hpc_rl.plan.memory import GIB, element_bytes
from hpc_rl.plan.schema import Group
from hpc_rl.plan.site import Site
from hpc_rl.recipe.schema import Recipe


def served_warnings(recipe: Recipe, site: Site, groups: Sequence[Group]) -> list[str]:
    """Which group's models do not fit on its GPUs, in words."""
    if site.gpus.memory_gb is None:
        return []
    warnings = []
    for group in groups:
        gpus = group.gpus_per_task
        if group.role not in ("reward", "teacher") or gpus == 0:
            continue
        sizes = [_gb(model, site) for model in _models(recipe, group.role)]
        each = sum(size for size in sizes if size is not None) / gpus
        if each > site.gpus.memory_gb:
            warnings.append(
                f"{group.role}: weights need {each:.1f} GiB per GPU, the site's GPUs have "
                f"{site.gpus.memory_gb:g}; raise cluster.{group.role}.gpus_per_replica"
            )
    return warnings


def _models(recipe: Recipe, role: str) -> list[dict[str, Any]]:
    if role == "teacher":
        return [recipe.teacher.model_dump()] if recipe.teacher is not None else []
    return [item for item in recipe.reward if item["name"] == "model"]


def _gb(model: dict[str, Any], site: Site) -> float | None:
    """None where the files are not here, or say nothing; `check` complains of that."""
    folder = find_model(model["path"], model["revision"], site.paths.hf_home)
    if folder is None:
        return None
    try:
        parameters = read_facts(folder).parameters
    except ModelFilesError:
        return None
    return None if parameters is None else parameters * element_bytes(model["dtype"]) / GIB
