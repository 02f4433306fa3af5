"""The adapter of an adapted model alone, as a `WeightSource`: what `rollout.weights.lora: adapter` sends."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_rl.models.base import ModelError
from hpc_rl.models.hf.adapted import AdaptedModel
from hpc_rl.weights.adapter import AdapterMeta, factor_names, meta_entry


class AdapterSource:
    """Factors in fp32, as they are trained, with the scales that the policy computes with.

    Raises ModelError where something else is trained as well: an engine would never see it.
    """

    def __init__(self, model: AdaptedModel) -> None:
        deltas = model.deltas
        self._weights = [name for name in model.named_tensors() if name in deltas]
        self._deltas, self._base = deltas, model.fingerprint.hex()
        factors = {name for weight in self._weights for name in deltas.names(weight)}
        trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
        others = sorted(trained - factors) + [name for name in self._weights if not name.endswith(".weight")]
        if others:
            raise ModelError(
                f"rollout.weights.lora: {', '.join(others[:3])} is trained and no part of an adapter of "
                "linear layers; set it to merged"
            )

    @torch.no_grad()
    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """See `WeightSource`. A collective when sharded; both factors of a layer travel together."""
        scales = {_layer(weight): self._deltas.scale(weight) for weight in self._weights}
        bucket = [meta_entry(AdapterMeta(self._base, scales))]
        nbytes = 0
        for weight in self._weights:
            pair = [_full(factor) for factor in self._deltas.names(weight).values()]
            size = sum(factor.nbytes for factor in pair)
            if nbytes and nbytes + size > max_bytes:
                yield bucket
                bucket, nbytes = [], 0
            bucket += zip(factor_names(_layer(weight)), pair, strict=True)
            nbytes += size
        yield bucket


def _layer(weight: str) -> str:
    return weight.removesuffix(".weight")


def _full(factor: Tensor) -> Tensor:
    value = factor.full_tensor() if isinstance(factor, DTensor) else factor
    return value.detach().float()
