"""Warnings about a recipe that can run, and is seldom meant like this."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_rl.plan.groups import Placement
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.schema import Cluster

# What means something to Slurm only. Each role's `nodes` is 1 on one machine; `cpus_per_task` and
# `gpus_per_node` do count there.
_SLURM_GROUP = ("nodes", "partition", "account", "qos", "constraint", "mem", "sbatch")
_ROLES = ("controller", "policy", "rollout")


def advice(loaded: LoadedRecipe, placement: Placement) -> list[str]:
    """One line each."""
    return [*_warmup(loaded), *(_ignored(loaded) if placement == "local" else [])]


def _warmup(loaded: LoadedRecipe) -> Iterator[str]:
    steps, warmup = loaded.recipe.policy.steps, loaded.recipe.policy.optimizer.warmup_steps
    if steps is not None and warmup >= steps:
        where = loaded.where("policy", "optimizer", "warmup_steps")
        yield (
            f"{where}: policy.optimizer.warmup_steps {warmup} is not less than policy.steps {steps}: "
            "the learning rate never reaches policy.optimizer.lr"
        )


def _ignored(loaded: LoadedRecipe) -> Iterator[str]:
    """Keys that the recipe says itself and that a run without Slurm does nothing with."""
    given, default = loaded.recipe.cluster.model_dump(), Cluster().model_dump()
    paths = [(role, key) for role in _ROLES for key in _SLURM_GROUP if key in given[role]]
    said = [
        (role, key)
        for role, key in paths
        if loaded.written("cluster", role, key) and given[role][key] != default[role][key]
    ]
    if said:
        names = ", ".join(f"cluster.{role}.{key}" for role, key in said)
        yield f"{loaded.where('cluster', *said[0])}: placement local starts no Slurm job and ignores {names}"
