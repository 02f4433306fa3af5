"""What plan and check need to know of a model, read from its `config.json` and safetensors headers."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rl.catalog.families import Family, family_of
from hpc_rl.catalog.flops import ModelFlops, model_flops

_MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit
# Names of one size over the families; GPT-2's own come second.
_HEADS = ("num_attention_heads", "n_head")
_HIDDEN = ("hidden_size", "n_embd")
_LAYERS = ("num_hidden_layers", "n_layer")
_KV_HEADS = ("num_key_value_heads",)


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
    shapes: dict[str, list[int]] | None = None  # of every tensor, by its name in the files
    flops: ModelFlops | None = None
    dtypes: frozenset[str] = frozenset()  # of the matrices in the files, as safetensors names them


def read_facts(folder: Path) -> ModelFacts:
    """Facts of the model in `folder`. Raises ModelFilesError for an unreadable config or weights file."""
    config = read_json(folder / "config.json")
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert isinstance(text, dict)

    def number(*names: str) -> int | None:
        return _first(text, names)

    heads, hidden = number(*_HEADS), number(*_HIDDEN)
    head_dim = number("head_dim") or (hidden // heads if hidden and heads else None)
    kv_heads = number(*_KV_HEADS)
    if kv_heads is None and text.get("multi_query") is True:
        kv_heads = 1
    tensors = _tensors(folder)
    shapes = None if tensors is None else {name: list(entry["shape"]) for name, entry in tensors.items()}
    counted = None if shapes is None else sum(map(math.prod, shapes.values()))
    origin = "safetensors"
    layers, vocab = number(*_LAYERS), number("vocab_size")
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
        max_position=max_position(config),
        parameters=counted,
        parameters_from=origin if counted is not None else "unknown",
        shapes=shapes,
        flops=model_flops(config),
        dtypes=frozenset(entry["dtype"] for entry in (tensors or {}).values() if len(entry["shape"]) > 1),
    )


def max_position(config: dict[str, Any]) -> int | None:
    """How many positions the model has by its config.json; None where that names no number."""
    text = config.get("text_config")
    return _first(text if isinstance(text, dict) else config, ("max_position_embeddings", "n_positions"))


def config_mistakes(config: dict[str, Any]) -> list[str]:
    """What of a `config.json` cannot be a model: no type, sizes that are no counts, heads that do not divide.

    Sizes may be missing where the config nests them (multimodal models write differences from a default
    there) and where the family is not in the catalog.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        return ["has no model_type; it must be the config.json of a Transformers model"]
    known, nested = family_of(model_type) is not None, config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    mistakes = [
        f"{name} is {json.dumps(text[name])}; must be a positive integer"
        for name in (*_HEADS, *_HIDDEN, *_LAYERS, *_KV_HEADS, "head_dim", "vocab_size")
        if text.get(name) is not None
        and not _is_count(text[name])
        and (known or not isinstance(text[name], list))  # some families have one number per layer
    ]
    if mistakes:
        return mistakes
    if known and text is config:
        wanted = (("attention heads", _HEADS), ("hidden size", _HIDDEN), ("layers", _LAYERS))
        for what, names in wanted:
            if _first(text, names) is None:
                mistakes.append(f"names no {what} ({' or '.join(names)}), which every {model_type} model has")
    heads, hidden, kv_heads = _first(text, _HEADS), _first(text, _HIDDEN), _first(text, _KV_HEADS)
    if heads and kv_heads and heads % kv_heads:
        mistakes.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if heads and hidden and hidden % heads and text.get("head_dim") is None and known:
        mistakes.append(f"hidden size {hidden} is not a multiple of the {heads} attention heads")
    return mistakes


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _first(text: dict[str, Any], names: tuple[str, ...]) -> int | None:
    return next((text[name] for name in names if _is_count(text.get(name))), None)


def count_parameters(folder: Path) -> int | None:
    """Elements of all tensors by the headers of `*.safetensors`; None when there are no such files."""
    shapes = tensor_shapes(folder)
    return None if shapes is None else sum(map(math.prod, shapes.values()))


def tensor_shapes(folder: Path) -> dict[str, list[int]] | None:
    """The shape of every tensor by the headers of `*.safetensors`; None when there are no such files."""
    tensors = _tensors(folder)
    return None if tensors is None else {name: list(entry["shape"]) for name, entry in tensors.items()}


def _tensors(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What the headers of `*.safetensors` say of every tensor; None when there are no such files."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
        if not all(file.is_file() for file in files):
            return None
    if not files:
        return None
    return {
        name: tensor
        for file in files
        for name, tensor in safetensors_header(file).items()
        if name != "__metadata__"
    }


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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelFilesError that names the file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelFilesError(f"{file} is not a JSON object")
    return data
