"""FSDP2 over a Hugging Face model: one group per layer, the rest (embedding, norm, head) in the root.

With `dp_replicate` > 1 the mesh has one more dimension (HSDP): sharded within a replica, gradients averaged
between. With `tp` > 1 layers are split by Transformers' plan first, and FSDP shards the pieces. Master
weights and gradients stay fp32; the compute dtype is cast per layer. Forward inputs are not cast: rotary
cos/sin and position-dependent scales must stay fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf import tensor_parallel


def layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost members of the module lists: decoder layers, vision blocks. In order of execution."""
    found: list[tuple[str, nn.Module]] = []

    def walk(prefix: str, parent: nn.Module) -> None:
        for name, child in parent.named_children():
            path = f"{prefix}{name}"
            if isinstance(parent, nn.ModuleList):
                found.append((path, child))
            else:
                walk(f"{path}.", child)

    walk("", module)
    return [(path, child) for path, child in found if any(True for _ in child.parameters())]


def needs_sharding(spec: ParallelSpec) -> bool:
    """One process that computes in fp32 runs the plain module: FSDP would only copy for it."""
    return spec.data_parallel * spec.tp > 1 or spec.compute_dtype != torch.float32 or spec.cpu_offload


def device_mesh(spec: ParallelSpec) -> DeviceMesh:
    """`(dp_replicate, dp_shard, tp)` over the default process group, without `dp_replicate` and `tp` of 1.

    Neighbouring ranks are one tensor-parallel group: they share a node.
    """
    sizes = {"dp_replicate": spec.dp_replicate, "dp_shard": spec.dp_shard, "tp": spec.tp}
    kept = {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}
    return init_device_mesh(spec.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def shard(module: nn.Module, spec: ParallelSpec) -> None:
    """Shard `module` (on meta) in place. A collective: the mesh makes process groups."""
    mesh = device_mesh(spec)
    if spec.tp > 1:
        tensor_parallel.split(module, mesh["tp"])
    data = mesh["dp_shard"] if spec.dp_replicate == 1 else mesh["dp_replicate", "dp_shard"]
    options: dict[str, Any] = {"mesh": data, "mp_policy": mixed_precision(spec)}
    if spec.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=spec.device.type == "cuda")
    for _, layer in layers(module):
        fully_shard(layer, **options)
    fully_shard(module, **options)


def mixed_precision(spec: ParallelSpec) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=spec.compute_dtype if spec.compute_dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
