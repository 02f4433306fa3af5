"""Any Hugging Face causal language model as a `ModelAdapter`: built on meta, sharded, then loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_rl.models.base import Media, ModelError, ParallelSpec
from hpc_rl.models.hf import attention
from hpc_rl.models.hf.folder import load_config, model_folder, weight_files
from hpc_rl.models.hf.loading import load_weights, materialise, resolve_names
from hpc_rl.models.hf.sharding import layers, needs_sharding, shard
from hpc_rl.recipe.schema import Model

LOG = logging.getLogger("hpc_rl.models")
PACKABLE = {"full_attention", "sliding_attention"}


class HfModel:
    """The model of the recipe. `module` is the (sharded) transformers module, fp32 master weights."""

    def __init__(self, module: Any, folder: Path, file_dtype: torch.dtype, sharded: bool) -> None:
        self.module = module
        self.folder = folder
        self.file_dtype = file_dtype
        self.sharded = sharded

    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        keep: Tensor,
        media: Sequence[Media | None] | None = None,
    ) -> Tensor:
        """See `ModelAdapter.logits`; the head runs on `keep` only. Our own attention gets the layout
        of the row; others get no mask, and transformers finds the boundaries in `position_ids`."""
        packed: dict[str, Any] = {}
        if self.module.config._attn_implementation == attention.NAME:
            packed["packed_layout"] = attention.layout_of(position_ids)
            packed["attention_mask"] = attention.no_mask(input_ids.device)
        output = self.module(
            input_ids=input_ids.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
            **packed,
        )
        return output.logits.squeeze(0)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
        """Full tensors in the file's names and the recipe's dtype, whole layers together.

        A collective when the model is sharded. Only one bucket is gathered at a time; a bucket holds
        one layer at least, else as many as fit into `max_bytes`. Tied weights are sent once.
        """
        from transformers.core_model_loading import revert_weight_conversion

        bucket: list[tuple[str, Tensor]] = []
        nbytes = 0
        for unit in self.units():
            size = sum(p.numel() for p in unit.values()) * self.file_dtype.itemsize
            if bucket and nbytes + size > max_bytes:
                yield bucket
                bucket, nbytes = [], 0
            bucket += list(revert_weight_conversion(self.module, self.gather(unit)).items())
            nbytes += size
        if bucket:
            yield bucket

    def file_names(self) -> list[str]:
        """The names that `buckets` yields, without gathering anything."""
        from transformers.core_model_loading import revert_weight_conversion

        names: list[str] = []
        for unit in self.units():
            empty = {name: torch.empty(p.shape, device="meta") for name, p in unit.items()}
            names += revert_weight_conversion(self.module, empty)
        return names

    def units(self) -> list[dict[str, Tensor]]:
        """Parameters by layer, and those outside of layers by the module that holds them: what a file
        holds, under the names in memory, sharded as it is."""
        prefixes = [f"{name}." for name, _ in layers(self.module)]
        units: dict[str, dict[str, Tensor]] = {}
        persistent = set(self.module.state_dict())
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        for name, value in named:
            if name in persistent:
                home = next((p for p in prefixes if name.startswith(p)), name.rpartition(".")[0])
                units.setdefault(home, {})[name] = value
        return list(units.values())

    # --- a `checkpoint.export.Source` -----------------------------------------------------------------
    def current(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values of `unit` to export, sharded as they are."""
        return unit

    def dtype_in_file(self, name: str, tensor: Tensor) -> torch.dtype:
        """Buffers stay as they are: those in a file (a router's fp32 bias) are fp32 because it matters."""
        is_weight = isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point()
        return self.file_dtype if is_weight else tensor.dtype

    def to_file(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors by name in memory, as the files have them."""
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.module, unit))

    @torch.no_grad()
    def gather(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors of `unit` (by name in memory) in the file's dtype. A collective when sharded.

        Buffers stay as they are: those in a file (a router's fp32 bias) are fp32 because it matters.
        """
        full = {}
        for name, parameter in unit.items():
            value = parameter.detach()
            if value.is_floating_point() and isinstance(parameter, torch.nn.Parameter):
                value = value.to(self.file_dtype)
            full[name] = value.full_tensor() if isinstance(value, DTensor) else value
        return full


def check_parallel(mesh: dict[str, int]) -> None:
    """Raise ModelError for mesh dimensions that are not built yet, naming the key."""
    for name in ("tp", "pp", "cp", "ep"):
        if mesh.get(name, 1) > 1:
            raise ModelError(
                f"policy.parallel.{name} = {mesh[name]}: only dp_shard and dp_replicate are there yet "
                f"({name} comes with issue B, parallelism); set it to 1"
            )


def build(spec: Model, parallel: ParallelSpec) -> HfModel:
    """Build, shard and load the model of the recipe. A collective over the default process group.

    The class is the one that config.json names, else AutoModelForCausalLM's. Raises ModelError.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    if spec.lora is not None:
        raise ModelError("model.lora is not there yet (it comes with issue B); remove it")
    folder = model_folder(spec.path, spec.revision)
    files = weight_files(folder)
    module = _on_meta(folder, spec)
    transforms = get_model_conversion_mapping(module)  # by class name, which sharding changes
    if parallel.activation_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = needs_sharding(parallel)
    if sharded:
        shard(module, parallel)
    materialise(module, parallel.device)
    load_weights(module, files, transforms)
    _check_ties(module)
    module.train()
    model = HfModel(module, folder, getattr(torch, spec.dtype), sharded)
    _check_packing(model, parallel)
    return model


def skeleton(spec: Model) -> tuple[Any, Path]:
    """`(module on meta, model folder)`: names, shapes and their way to the file's names; no weights."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    folder = model_folder(spec.path, spec.revision)
    module = _on_meta(folder, spec)
    resolve_names(module, weight_files(folder), get_model_conversion_mapping(module))
    return module, folder


def _on_meta(folder: Path, spec: Model) -> Any:
    import transformers

    config = load_config(folder, spec)
    _check_packable(config)
    _without_dropout(config)
    name = (config.architectures or [""])[0]
    known = getattr(transformers, name, None) if name else None
    implementation = spec.attn_implementation or attention.NAME
    try:
        with torch.device("meta"):
            if known is not None and not spec.trust_remote_code:
                return known._from_config(config, attn_implementation=implementation, dtype=torch.float32)
            return transformers.AutoModelForCausalLM.from_config(
                config,
                attn_implementation=implementation,
                dtype=torch.float32,
                trust_remote_code=spec.trust_remote_code,
            )
    except (ValueError, ImportError) as error:
        raise ModelError(f"{folder} ({name or config.model_type}): {str(error).splitlines()[0]}") from error


def _check_packable(config: Any) -> None:
    """A recurrent layer would carry its state from one packed sequence into the next, and chunks of
    attention would be counted from the start of the row. Raises ModelError."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    if kinds - PACKABLE:
        raise ModelError(
            f"{config.model_type} has {', '.join(sorted(kinds - PACKABLE))} layers, "
            "which leak between packed sequences; it cannot be trained yet"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        limit = rope.get("original_max_position_embeddings") or text.max_position_embeddings
        LOG.warning(
            "%s: rotary embeddings of type %s depend on the longest sequence of a row: keep every sequence "
            "at %d tokens or less, or its neighbours' log-probs change with it",
            config.model_type,
            rope["rope_type"],
            limit,
        )


def _without_dropout(config: Any) -> None:
    """The sampler has no dropout, so the trainer's log-probs must have none."""
    for owner in {id(c): c for c in (config, config.get_text_config())}.values():
        for key, value in owner.to_dict().items():
            if "drop" in key and isinstance(value, float) and value > 0:
                LOG.warning("%s %s set to 0 (config.json has %g)", owner.model_type, key, value)
                setattr(owner, key, 0.0)


@torch.no_grad()
def _check_packing(model: HfModel, parallel: ParallelSpec) -> None:
    """What a sequence gets must not depend on its neighbour in the row. A collective when sharded.

    Transformers finds the boundaries for most models, not for all (GPT-OSS makes its masks without the
    position ids), and says nothing where it does not.
    """
    vocabulary = model.module.config.get_text_config().vocab_size
    results = []
    for first in (1, 2):
        neighbour = torch.arange(first, first + 12) % vocabulary
        ids = torch.cat([neighbour, torch.arange(3, 7) % vocabulary]).to(parallel.device)
        positions = torch.cat([torch.arange(12), torch.arange(4)]).to(parallel.device)
        keep = torch.arange(12, 16, device=parallel.device)
        results.append(model.logits(ids, positions, keep).float().log_softmax(-1))
    if model.sharded:
        model.module.reshard()  # a forward without backward leaves the root's parameters whole
    difference = float((results[0] - results[1]).abs().max())
    if difference > (1e-4 if parallel.compute_dtype == torch.float32 else 5e-2):
        raise ModelError(
            f"packed sequences leak into each other in {type(model.module).__name__} with "
            f"attn_implementation {model.module.config._attn_implementation} "
            f"(log-probs moved by {difference:.2g}); "
            "leave model.attn_implementation out"
        )


def _check_ties(module: Any) -> None:
    for copy, original in module.all_tied_weights_keys.items():
        assert module.get_parameter(copy) is module.get_parameter(original), f"{copy} is not {original}"
