"""Warnings about a recipe that can run, and is seldom meant like this."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_rl.plan.groups import Placement
from hpc_rl.recipe.checks import parse_time
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.schema import Cluster, ScoringOptions

# What means something to Slurm only. Each role's `nodes` is 1 on one machine; `cpus_per_task` and
# `gpus_per_node` do count there.
_SLURM_GROUP = ("nodes", "partition", "account", "qos", "constraint", "mem", "sbatch")
# Start-up alone (imports, the engine's compilation, loading of weights) takes minutes.
_WORK_S = 300
_ROLES = ("controller", "policy", "rollout", "reward", "teacher")


def advice(loaded: LoadedRecipe, placement: Placement, *, here: bool = False) -> list[str]:
    """One line each. `here`: inside an allocation, which has a time of its own."""
    always = [*_warmup(loaded), *_experts(loaded), *_uncorrected(loaded), *_row_mask(loaded)]
    if placement == "local":
        return [*always, *_ignored(loaded)]
    return [*always, *([] if here else _time(loaded))]


def _time(loaded: LoadedRecipe) -> Iterator[str]:
    """An attempt that is told to stop before it has done anything is requeued, and does it again."""
    cluster = loaded.recipe.cluster
    left = parse_time(cluster.time) * 60 - cluster.signal_seconds
    if left < _WORK_S:
        where = loaded.problem("", "cluster", "signal_seconds").where
        yield (
            f"{where}: cluster.time {cluster.time} less cluster.signal_seconds {cluster.signal_seconds} "
            f"leaves {left} s to work; start-up alone takes minutes, so the job may be requeued again and "
            "again without a step: raise cluster.time or lower cluster.signal_seconds"
        )


def _warmup(loaded: LoadedRecipe) -> Iterator[str]:
    steps, warmup = loaded.recipe.policy.steps, loaded.recipe.policy.optimizer.warmup_steps
    if steps is not None and warmup >= steps:
        where = loaded.where("policy", "optimizer", "warmup_steps")
        yield (
            f"{where}: policy.optimizer.warmup_steps {warmup} is not less than policy.steps {steps}: "
            "the learning rate never reaches policy.optimizer.lr"
        )


def _uncorrected(loaded: LoadedRecipe) -> Iterator[str]:
    """Samples of an older policy, trained as if they were of the newest one."""
    algorithm = loaded.recipe.algorithm
    correction, staleness = algorithm.get("correction"), algorithm.get("max_staleness")
    if not isinstance(correction, dict) or not isinstance(staleness, int) or staleness == 0:
        return
    if correction.get("kind") == "none":
        where = loaded.where("algorithm", "correction", "kind")
        yield (
            f"{where}: algorithm.correction.kind none with algorithm.max_staleness {staleness}: samples "
            f"up to {staleness} versions old are trained as if they were new; set max_staleness to 0, or the "
            "kind to tis, icepop or sequence_mask"
        )


def _row_mask(loaded: LoadedRecipe) -> Iterator[str]:
    """Transformers' own sdpa and eager know no boundaries but those of a mask."""
    name = loaded.recipe.model.attn_implementation
    if name in ("sdpa", "eager") and loaded.recipe.policy.trainer == "fsdp2":
        where = loaded.where("model", "attn_implementation")
        yield (
            f"{where}: model.attn_implementation {name} attends over a mask of the whole packed row, "
            "quadratic in its tokens; leave it out for SDPA sequence by sequence, with the same numbers"
        )


def _experts(loaded: LoadedRecipe) -> Iterator[str]:
    """PEFT adds B A to the whole tensor in the forward, and the sum is kept for the backward."""
    recipe = loaded.recipe
    if recipe.model.lora is None or not recipe.model.lora.target_parameters:
        return
    if recipe.policy.trainer == "fsdp2" and not recipe.policy.activation_checkpointing:
        where = loaded.where("model", "lora", "target_parameters")
        yield (
            f"{where}: with model.lora.target_parameters each GPU keeps the whole merged experts of all "
            "layers from the forward to the backward; set policy.activation_checkpointing to true"
        )


def _ignored(loaded: LoadedRecipe) -> Iterator[str]:
    """Keys that the recipe says itself and that a run without Slurm does nothing with."""
    given, default = loaded.recipe.cluster.model_dump(), Cluster().model_dump()
    options = ScoringOptions().model_dump()
    paths = [(role, key) for role in _ROLES for key in _SLURM_GROUP if key in (given[role] or ())]
    said = [
        (role, key)
        for role, key in paths
        if loaded.written("cluster", role, key) and given[role][key] != (default[role] or options)[key]
    ]
    if said:
        names = ", ".join(f"cluster.{role}.{key}" for role, key in said)
        yield f"{loaded.where('cluster', *said[0])}: placement local starts no Slurm job and ignores {names}"
