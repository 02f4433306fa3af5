"""FSDP2 over a Hugging Face model: one group per layer, the rest (embedding, norm, head) in the root.

With `dp_replicate` > 1 the mesh is two-dimensional (HSDP): sharded within a replica, gradients averaged
between. Master weights and gradients stay fp32; the compute dtype is cast per layer. Forward inputs
are not cast: rotary cos/sin and position-dependent scales must stay fp32.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hpc_rl.models.base import ParallelSpec


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
    return spec.data_parallel > 1 or spec.compute_dtype != torch.float32


def data_mesh(spec: ParallelSpec) -> DeviceMesh:
    """`(dp_shard)` or `(dp_replicate, dp_shard)` over the default process group."""
    if spec.dp_replicate == 1:
        return init_device_mesh(spec.device.type, (spec.dp_shard,), mesh_dim_names=("dp_shard",))
    return init_device_mesh(
        spec.device.type, (spec.dp_replicate, spec.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )


def shard(module: nn.Module, spec: ParallelSpec) -> None:
    """Shard `module` (on meta) in place. A collective: the mesh makes process groups."""
    mesh = data_mesh(spec)
    policy = MixedPrecisionPolicy(
        param_dtype=spec.compute_dtype if spec.compute_dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for _, layer in layers(module):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
