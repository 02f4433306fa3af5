"""Memory per GPU of the policy: weights, gradients and optimizer state. Activations are not counted."""

from __future__ import annotations

from hpc_rl.plan.schema import MemoryEstimate, Mesh
from hpc_rl.recipe.schema import Recipe

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def estimate(recipe: Recipe, parameters: int, mesh: Mesh, gpu_gb: float | None) -> MemoryEstimate:
    """GiB per GPU. Weights, gradients and both AdamW moments are kept in fp32 and sharded over every
    dimension but `dp_replicate`; the forward runs in `model.dtype` on one gathered layer at a time."""
    shards = mesh.dp_shard * mesh.cp * mesh.tp * mesh.pp
    own = parameters / shards / GIB
    moments = 2 if recipe.policy.optimizer.name == "adamw" else 0
    return MemoryEstimate(
        parameters=parameters,
        weights_gb=round(4 * own, 3),
        gradients_gb=round(4 * own, 3),
        optimizer_gb=round(4 * moments * own, 3),
        gpu_gb=gpu_gb,
    )


def memory_warnings(recipe: Recipe, memory: MemoryEstimate) -> list[str]:
    """What does not fit on the site's GPUs, in words."""
    if memory.gpu_gb is None:
        return []
    warnings = []
    total = memory.weights_gb + memory.gradients_gb + memory.optimizer_gb
    if total > memory.gpu_gb:
        warnings.append(
            f"policy: weights {memory.weights_gb:.1f} + gradients {memory.gradients_gb:.1f} + optimizer "
            f"{memory.optimizer_gb:.1f} = {total:.1f} GiB per GPU, the site's GPUs have {memory.gpu_gb:g}; "
            "raise policy.parallel.dp_shard"
        )
    if recipe.rollout is not None:
        width = recipe.rollout.parallel.tp * recipe.rollout.parallel.pp
        engine = memory.parameters * _BYTES[recipe.model.dtype] / width / GIB
        if engine > memory.gpu_gb:
            warnings.append(
                f"rollout: weights need {engine:.1f} GiB per GPU, the site's GPUs have {memory.gpu_gb:g}; "
                "raise rollout.parallel.tp"
            )
    return warnings
