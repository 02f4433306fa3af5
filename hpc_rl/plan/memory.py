"""Memory per GPU of the policy: weights, gradients and optimizer state. Activations are not counted."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from hpc_rl.plan.schema import Group, MemoryEstimate, Mesh
from hpc_rl.recipe.reference_model import reference_mode
from hpc_rl.recipe.schema import Lora, Model, Recipe, WeightSync

GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WIDTH = 4096  # of a typical layer: what an adapter adds to a model whose shapes are not known
# Files have each expert's matrices; in memory those of a layer are one tensor, which is no linear layer.
_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)$")
_FUSED = {"gate_proj": "gate_up_proj", "w1": "gate_up_proj", "up_proj": "gate_up_proj", "w3": "gate_up_proj"}
_NOT_LINEAR = re.compile(r"(^|\.)(embed|lm_head|norm|ln_|wte|wpe|patch_embed|.*embedding)")

Shapes = dict[str, list[int]]


def estimate(
    recipe: Recipe, parameters: int, mesh: Mesh, gpu_gb: float | None, shapes: Shapes | None = None
) -> MemoryEstimate:
    """GiB per GPU. Weights are kept in fp32, and so are those of a reference model, and gradients, both AdamW
    moments and the moving average of those that are trained; all are sharded over every dimension but
    `dp_replicate`. The forward runs in `model.dtype` on one gathered layer at a time.

    `shapes` are the tensors of the model's files by name, where these are here.
    """
    policy = recipe.policy
    added, trained = trained_parameters(recipe.model, parameters, shapes)
    per_element = 4 / (mesh.dp_shard * mesh.cp * mesh.tp * mesh.pp) / GIB
    moments = 2 if policy.optimizer.name == "adamw" else 0
    return MemoryEstimate(
        parameters=parameters,
        trained=trained,
        weights_gb=round(per_element * (parameters + added), 3),
        gradients_gb=round(per_element * trained, 3),
        optimizer_gb=round(per_element * moments * trained, 3),
        ema_gb=round(per_element * trained, 3) if policy.ema is not None else 0.0,
        reference_gb=round(per_element * parameters, 3) if _second_model(recipe) else 0.0,
        on_host=policy.cpu_offload,
        gpu_gb=gpu_gb,
    )


def _second_model(recipe: Recipe) -> bool:
    """Whether a second model lies on the GPU: a reference that is one, taken to be as large as the policy."""
    return reference_mode(recipe) == "full" and not recipe.policy.reference.cpu_offload


def trained_parameters(model: Model, parameters: int, shapes: Shapes | None) -> tuple[int, int]:
    """(parameters that adapters add, parameters that are trained).

    Names in files differ a little from those in memory, which `model.train` and `model.freeze` are about;
    an estimate may say so.
    """
    if model.lora is not None:
        added = _adapter(model.lora, parameters, shapes)
        return added, added
    if shapes is None or not (model.train or model.freeze):
        return 0, parameters
    trained = [
        name
        for name in shapes
        if (not model.train or _matches(model.train, name)) and not _matches(model.freeze, name)
    ]
    return 0, sum(math.prod(shapes[name]) for name in trained)


def _matches(patterns: list[str], name: str) -> bool:
    try:
        return any(re.search(pattern, name) for pattern in patterns)
    except re.error:  # said where the pattern is used
        return False


def _adapter(lora: Lora, parameters: int, shapes: Shapes | None) -> int:
    """Elements of the adapter: r x (in + out) of each layer and expert that has one, and the modules saved
    whole."""
    if shapes is None:
        return int(parameters * 2 * lora.r / _WIDTH)
    total = 0
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if any(_names(saved, module) for saved in lora.modules_to_save):
            total += math.prod(shape)
        elif expert := _EXPERT.search(module):
            total += _of_expert(lora, module, expert.group(1), shape)
        elif any(_names(target, name) for target in lora.target_parameters):
            total += _rank(lora, name) * math.prod(shape[:-2]) * sum(shape[-2:])
        elif name.endswith(".weight") and len(shape) == 2 and _has_adapter(lora, module):
            total += _rank(lora, module) * sum(shape)
    return total


def _of_expert(lora: Lora, module: str, own: str, shape: list[int]) -> int:
    """Of one expert's matrix [out, in], as a part of the tensor that all are in; two of them share one A."""
    fused = _FUSED.get(own, "down_proj")
    parameter = f"{module[: module.rindex('experts.')]}experts.{fused}"
    if not any(_names(target, parameter) for target in lora.target_parameters):
        return 0
    return _rank(lora, parameter) * (shape[0] if own in ("up_proj", "w3") else sum(shape))


def _has_adapter(lora: Lora, module: str) -> bool:
    if any(_names(excluded, module) for excluded in lora.exclude_modules):
        return False
    if lora.target_modules == "all-linear":
        return _NOT_LINEAR.search(module) is None
    return any(_names(target, module) for target in lora.target_modules)


def _rank(lora: Lora, module: str) -> int:
    return next((rank for name, rank in lora.r_pattern.items() if _names(name, module)), lora.r)


def _names(target: str, module: str) -> bool:
    """PEFT's rule for one entry of a list: the module's name, or the end of it."""
    return module == target or module.endswith(f".{target}")


def element_bytes(dtype: str) -> int:
    """Of a weight in `dtype`."""
    return _BYTES[dtype]


def memory_warnings(recipe: Recipe, memory: MemoryEstimate) -> list[str]:
    """What does not fit on the site's GPUs, in words."""
    if memory.gpu_gb is None:
        return []
    warnings = []
    if memory.total_gb > memory.gpu_gb and not memory.on_host:
        average = f" + average {memory.ema_gb:.1f}" if memory.ema_gb else ""
        average += f" + reference {memory.reference_gb:.1f}" if memory.reference_gb else ""
        warnings.append(
            f"policy: weights {memory.weights_gb:.1f} + gradients {memory.gradients_gb:.1f} + optimizer "
            f"{memory.optimizer_gb:.1f}{average} = {memory.total_gb:.1f} GiB per GPU, the site's GPUs have "
            f"{memory.gpu_gb:g}; raise policy.parallel.dp_shard"
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


def auto_transport(sync: WeightSync, on_gpu: bool) -> str:
    """What `rollout.weights.transport: auto` is: nccl between GPUs, unless copies on the hosts are wanted."""
    return "nccl" if on_gpu and sync.mode == "full" and not sync.overlap else "gloo"


def copies_note(
    recipe: Recipe, parameters: int | None, groups: Sequence[Group], *, adapter: bool = False
) -> str:
    """How much host memory pushes that overlap take, and where; empty where they do not."""
    if recipe.rollout is None or parameters is None or not recipe.has_policy:
        return ""
    sync = recipe.rollout.weights
    on_gpu = all(group.gpus_per_task > 0 for group in groups if group.role in ("policy", "rollout"))
    transport = auto_transport(sync, on_gpu) if sync.transport == "auto" else sync.transport
    if transport != "gloo" or sync.overlap is False or adapter:
        return ""
    size = parameters * _BYTES[recipe.model.dtype] / GIB
    workers = recipe.rollout.parallel.tp * recipe.rollout.parallel.pp
    each = "each replica" if workers == 1 else f"each of the {workers} workers of a replica"
    return (
        f"pushes overlap with training and generation: policy rank 0 and {each} keep a copy of the weights "
        f"in host memory, {size:.2f} GiB (rollout.weights.overlap: false does without)"
    )
