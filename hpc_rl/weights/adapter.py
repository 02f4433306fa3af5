"""A push of a LoRA adapter alone: its factors by the names of PEFT's files, and what they belong to.

Such a push has the frames, checksums and digests of any other (`protocol.py`). Beside the tensors of an
`adapter_model.safetensors`, in fp32, it holds `adapter.json` as bytes: the scale of every adapted layer as
the policy computes with it, and the fingerprint of the model's files that the policy trains over. An engine
that loaded other files refuses the push; the weights it stands for are W + scale * B A over the loaded W.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import torch

from hpc_rl.weights.protocol import WeightTransferError

META = "adapter.json"
PREFIX = "base_model.model."


class AdapterMeta(msgspec.Struct, frozen=True):
    """`base` is the fingerprint (hex) of the model's files; `scales` has every adapted layer by its name."""

    base: str
    scales: dict[str, float]


@dataclass(frozen=True)
class Factors:
    """The layer's weight [out, in] is W + `scale` * `b` @ `a`; a [r, in], b [out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


def factor_names(layer: str) -> tuple[str, str]:
    """The names of A and B of `layer` in an adapter's file."""
    return f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"


def meta_entry(meta: AdapterMeta) -> tuple[str, torch.Tensor]:
    """`meta` as one entry of a bucket."""
    return META, torch.frombuffer(bytearray(msgspec.json.encode(meta)), dtype=torch.uint8)


def read_adapter(tensors: Mapping[str, torch.Tensor], base: str) -> dict[str, Factors]:
    """Layer -> factors of a push that arrived whole; `base` is the fingerprint of what the engine loaded.

    Raises WeightTransferError: not an adapter, another base, or factors that make no layer.
    """
    if META not in tensors:
        raise WeightTransferError(
            "the push holds whole weights and this engine waits for an adapter: rollout.weights.lora is not "
            "the same on both sides"
        )
    meta = msgspec.json.decode(tensors[META].cpu().numpy().tobytes(), type=AdapterMeta)
    if meta.base != base:
        raise WeightTransferError(
            "the files of the model that this replica loaded are not those the policy trains over: make them "
            "the same on all nodes, or set rollout.weights.lora to merged"
        )
    return dict(_pairs(tensors, meta))


def _pairs(tensors: Mapping[str, torch.Tensor], meta: AdapterMeta) -> Iterator[tuple[str, Factors]]:
    wanted = {name for layer in meta.scales for name in factor_names(layer)} | {META}
    if wanted != set(tensors):
        odd = sorted(wanted ^ set(tensors))
        raise WeightTransferError(f"the adapter lacks, or has besides its layers: {', '.join(odd[:5])}")
    for layer, scale in meta.scales.items():
        a, b = (tensors[name] for name in factor_names(layer))
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise WeightTransferError(f"the factors of {layer} have shapes {list(a.shape)}, {list(b.shape)}")
        yield layer, Factors(a, b, scale)
