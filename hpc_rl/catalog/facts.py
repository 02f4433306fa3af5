"""What plan and check need to know of a model, read from its `config.json` and safetensors headers."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rl.catalog.families import Family, family_of

_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit


class ModelFilesError(ValueError):
    """The model's files are there but cannot be understood."""


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of one model. `family` is None for a model type the catalog does not know."""

    model_type: str
    family: Family | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    hidden_size: int | None
    layers: int | None
    vocab_size: int | None
    max_position: int | None
    parameters: int | None
    parameters_from: str = "unknown"  # safetensors | config | unknown


def read_facts(folder: Path) -> ModelFacts:
    """Facts of the model in `folder`. Raises ModelFilesError for an unreadable config or weights file."""
    config = _read_json(folder / "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)

    def number(*names: str) -> int | None:
        for name in names:
            value = text.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    heads = number("num_attention_heads", "n_head")
    hidden = number("hidden_size", "n_embd")
    head_dim = number("head_dim") or (hidden // heads if hidden and heads else None)
    kv_heads = number("num_key_value_heads")
    if kv_heads is None and text.get("multi_query") is True:
        kv_heads = 1
    counted = count_parameters(folder)
    origin = "safetensors"
    layers, vocab = number("num_hidden_layers", "n_layer"), number("vocab_size")
    kv = kv_heads or heads
    if counted is None:
        counted, origin = _from_config(text, config, hidden, layers, vocab, heads, kv, head_dim), "config"
    model_type = str(config.get("model_type", "unknown"))
    return ModelFacts(
        model_type=model_type,
        family=family_of(model_type),
        heads=heads,
        kv_heads=kv,
        head_dim=head_dim,
        hidden_size=hidden,
        layers=layers,
        vocab_size=vocab,
        max_position=number("max_position_embeddings", "n_positions"),
        parameters=counted,
        parameters_from=origin if counted is not None else "unknown",
    )


def count_parameters(folder: Path) -> int | None:
    """Elements of all tensors by the headers of `*.safetensors`; None when there are no such files."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if not all(file.is_file() for file in files):
            return None
    if not files:
        return None
    total = 0
    for file in files:
        for name, tensor in safetensors_header(file).items():
            if name == "__metadata__":
                continue
            size = 1
            for length in tensor["shape"]:
                size *= length
            total += size
    return total


def safetensors_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file (8-byte little-endian length, then JSON).

    Raises ModelFilesError for a truncated or foreign file (a Git LFS pointer, for example).
    """
    try:
        with file.open("rb") as handle:
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= _MAX_HEADER:
                raise ModelFilesError(f"{file} is not a safetensors file (damaged, or a Git LFS pointer)")
            header = json.loads(handle.read(length))
    except (OSError, ValueError) as error:
        if isinstance(error, ModelFilesError):
            raise
        raise ModelFilesError(f"{file} cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise ModelFilesError(f"{file} is not a safetensors file")
    return header


def _from_config(
    text: dict[str, Any],
    config: dict[str, Any],
    hidden: int | None,
    layers: int | None,
    vocab: int | None,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
) -> int | None:
    """Parameters of a decoder by its config: embeddings, attention and MLP; norms are left out."""
    inner = text.get("intermediate_size") or text.get("n_inner") or (4 * hidden if hidden else None)
    if not (hidden and layers and vocab and heads and kv_heads and head_dim and isinstance(inner, int)):
        return None
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    matrices = 2 if "n_embd" in text else 3  # GPT-2 kin have no gate
    mlp = matrices * hidden * inner
    experts = text.get("num_local_experts") or text.get("num_experts")
    if isinstance(experts, int) and experts > 1:
        expert_inner = text.get("moe_intermediate_size") or inner
        mlp = experts * 3 * hidden * expert_inner + hidden * experts
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
    return layers * (attention + mlp) + vocab * hidden * (1 if tied else 2)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelFilesError(f"{file} is not a JSON object")
    return data
