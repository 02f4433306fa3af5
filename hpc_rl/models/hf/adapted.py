"""A model with LoRA adapters to the rest of the policy: the plain model's names, the merged values.

Checkpoints hold what is trained (the factors, modules saved whole); pushes to the rollouts and exports
hold W + scale * B A under the published names, so samplers and users see an ordinary model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_rl.models.base import ModelError, ParallelSpec
from hpc_rl.models.blocks import held_blocks
from hpc_rl.models.hf import lora
from hpc_rl.models.hf.loading import load_weights
from hpc_rl.models.hf.model import HfModel
from hpc_rl.recipe.schema import Lora, Model


def inject(module: Any, spec: Model, parallel: ParallelSpec) -> None:
    """Put the adapters of the recipe into `module` (on meta). Raises ModelError."""
    assert spec.lora is not None
    if parallel.tp > 1 and spec.lora.dropout > 0:
        raise ModelError(
            f"model.lora.dropout: {spec.lora.dropout:g} would be another mask on each rank of "
            f"policy.parallel.tp = {parallel.tp}; set it to 0"
        )
    lora.inject(module, spec.lora, spec.path)
    if parallel.tp > 1 and lora.has_experts(module):
        raise ModelError(
            "model.lora.target_parameters: adapters of experts in one tensor are not split by tensor; set "
            "policy.parallel.tp to 1"
        )


def load(module: Any, files: dict[str, Path], transforms: list[Any], spec: Lora, seed: int) -> None:
    """Fill base weights from `files`, then the adapters. Raises ModelError."""
    load_weights(module, files, transforms, lora.plain_tensors(module.state_dict(keep_vars=True)))
    lora.initialise(module, spec, seed)


class AdaptedModel(HfModel):
    """See `HfModel`."""

    def named_tensors(self) -> dict[str, Tensor]:
        return lora.plain_tensors(super().named_tensors())

    @functools.cached_property
    def deltas(self) -> lora.Deltas:
        """Found once: `current` is asked layer by layer, at every push."""
        return lora.Deltas(self.module)

    @torch.no_grad()
    def current(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        """The merged values, sharded as the weights are. A collective when sharded: factors are gathered."""
        deltas = self.deltas
        return {
            name: merged(value, name, deltas) if name in deltas else value.detach()
            for name, value in unit.items()
        }

    @torch.no_grad()
    def adapter(self) -> dict[str, Tensor]:
        """The full tensors of the adapter's file: copies, in fp32. A collective when sharded."""
        found = lora.adapter_parameters(self.module)
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).to("cpu", copy=True)
            for name, p in found.items()
        }


class StoredAdaptedModel(AdaptedModel):
    """An adapted model on meta whose tensors come from `read` (by name in memory): a checkpoint's."""

    read: Callable[[dict[str, Tensor]], dict[str, Tensor]]

    @functools.cached_property
    def saved_whole(self) -> dict[str, str]:
        """Plain name -> name in memory, of the weights of modules that are saved whole."""
        names = (name for name, _ in self.module.named_parameters())
        return {lora.plain_name(name): name for name in names if lora.is_saved_whole(name)}

    def current(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        deltas = self.deltas
        wanted = {self.saved_whole.get(name, name): tensor for name, tensor in unit.items()}
        values = {lora.plain_name(name): value for name, value in self.read(wanted).items()}
        factors = {name: deltas.names(name) for name in unit if name in deltas}
        stored = self.read({n: p for pair in factors.values() for n, p in pair.items()})
        for name, pair in factors.items():
            a, b = (stored[n] for n in pair)
            values[name] = lora.merge(values[name], *deltas.matrices(name, a, b), deltas.scale(name))
        return values

    def adapter(self) -> dict[str, Tensor]:
        named = dict(self.module.named_parameters())
        mine = {n: p for n, p in named.items() if lora.is_factor(n) or lora.is_saved_whole(n)}
        return {lora.file_name(name): value for name, value in self.read(mine).items()}


class NoWeights:
    """An export's source without any: the adapter alone is written."""

    def units(self) -> list[dict[str, Tensor]]:
        return []

    def current(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        return unit

    def dtype_in_file(self, name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype

    def to_file(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        return unit


def adapter_export(
    model: AdaptedModel, spec: Lora
) -> tuple[AdaptedModel | NoWeights, Callable[[Path], None]]:
    """`(what the export is made of, what it writes besides)`: merged weights and the adapter in `adapter/`,
    or the adapter alone. A collective when sharded."""
    tensors, module = model.adapter(), model.module
    if spec.export == "adapter":
        return NoWeights(), lambda folder: lora.write_adapter(folder, module, tensors)
    return model, lambda folder: lora.write_adapter(folder / "adapter", module, tensors)


def merged(weight: Tensor, name: str, deltas: lora.Deltas) -> Tensor:
    """`lora.merge` of tensors sharded in any way: each rank makes its own blocks of the weight. The factors
    are gathered, which is little beside the weight."""
    factors = (f.full_tensor() if isinstance(f, DTensor) else f for f in deltas.names(name).values())
    a, b = deltas.matrices(name, *factors)
    scale = deltas.scale(name)
    if not isinstance(weight, DTensor):
        return lora.merge(weight.detach(), a, b, scale)
    local = weight.to_local()
    values = torch.empty_like(local, dtype=torch.float32)
    for block in held_blocks(weight):
        *experts, rows, columns = block.of_full()
        own_a, own_b = a[(*experts, slice(None), columns)], b[(*experts, rows)]
        values[block.of_local()] = lora.merge(local[block.of_local()], own_a, own_b, scale)
    return DTensor.from_local(
        values,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
