"""Any Hugging Face language model, with images or without, as a `ModelAdapter`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_rl.algorithms.chunked_head import Weights
from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.models.base import Media, ModelError, ParallelSpec, Row
from hpc_rl.models.hf.attention import NotPacked
from hpc_rl.models.hf.classes import build_on_meta, has_vision
from hpc_rl.models.hf.conversion import transforms_of
from hpc_rl.models.hf.folder import fingerprint, model_folder, weight_files
from hpc_rl.models.hf.freeze import choose_trained
from hpc_rl.models.hf.head import ChunkedHead, chunked_head
from hpc_rl.models.hf.loading import load_weights, materialise, move_buffers, resolve_names
from hpc_rl.models.hf.media import placeholder_ids
from hpc_rl.models.hf.rows import (
    Leak,
    Rows,
    check_rows,
    close_cross_attention,
    packed,
    padded,
    reason_to_pad,
)
from hpc_rl.models.hf.sharding import layers, needs_sharding, shard
from hpc_rl.models.hf.staging import staged_folder
from hpc_rl.recipe.schema import Model

LOG = logging.getLogger("hpc_rl.models")


class HfModel:
    """The model of the recipe. `module` is the (sharded) transformers module, fp32 master weights.

    `rows` is how a row goes through it (`rows.packed` or `rows.padded`). `head` makes log-probs chunk by
    chunk; without one they are made from logits. With `needs_media`, every row must have an image on every
    rank: the vision tower is sharded, and a rank that did not run it would leave the others waiting in its
    collectives. A row without one gets a blank one, of which no token is kept.
    """

    rows: Rows = staticmethod(packed)
    needs_media: bool = False
    head: ChunkedHead | None = None

    def __init__(self, module: Any, folder: Path, file_dtype: torch.dtype, sharded: bool) -> None:
        self.module = module
        self.folder = folder
        self.file_dtype = file_dtype
        self.sharded = sharded
        self.placeholders = placeholder_ids(module.config)

    def logits(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        keep: Tensor,
        media: Sequence[Media | None] | None = None,
    ) -> Tensor:
        """See `ModelAdapter.logits`; the head runs on `keep` only."""
        return self.rows(self.module, input_ids, position_ids, keep, media)

    def log_probs(
        self, row: Row, temperature: float = 1.0, with_entropy: bool = False, weights: Weights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `ModelAdapter.log_probs`."""
        if self.head is not None and self.head.pays(row.keep):
            return self.head.log_probs(row, temperature, with_entropy, weights)
        logits = self.logits(row.input_ids, row.position_ids, row.keep, row.media)
        return token_log_probs(logits, row.targets, temperature, with_entropy)

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """Sixteen bytes that change with the model's files (`folder.fingerprint`)."""
        return fingerprint(self.folder)

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
        for name, value in self.named_tensors().items():
            home = next((p for p in prefixes if name.startswith(p)), name.rpartition(".")[0])
            units.setdefault(home, {})[name] = value
        return list(units.values())

    def named_tensors(self) -> dict[str, Tensor]:
        """Parameters (tied ones once) and persistent buffers, by name in memory."""
        persistent = set(self.module.state_dict())
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {name: value for name, value in named if name in persistent}

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
        """Full tensors of `unit` (by name in memory) in the file's dtype. A collective when sharded."""
        full = {}
        for name, value in self.current(unit).items():
            value = value.detach().to(self.dtype_in_file(name, unit[name]))
            full[name] = value.full_tensor() if isinstance(value, DTensor) else value
        return full


def check_parallel(mesh: dict[str, int]) -> None:
    """Raise ModelError for mesh dimensions that are not built, naming the key."""
    for name in ("pp", "cp", "ep"):
        if mesh.get(name, 1) > 1:
            raise ModelError(
                f"policy.parallel.{name} = {mesh[name]}: this trainer shards by dp_replicate, dp_shard and "
                "tp; set it to 1"
            )


def build(spec: Model, parallel: ParallelSpec, seed: int = 0) -> HfModel:
    """Build, shard and load the model of the recipe. A collective over the default process group.

    `seed` is for the first values of adapters. The class is as `classes.find_class` says. Rows are packed
    where that is right, and padded where not; the log says which and why. Raises ModelError.
    """
    folder = model_folder(spec.path, spec.revision)
    module, origin = build_on_meta(folder, spec)
    name = type(module).__name__
    reason = reason_to_pad(module.config, spec.attn_implementation)
    if not reason:
        model = _build(spec, parallel, seed, module, origin, pad=False)
        try:
            check_rows(model.module, model.rows, parallel, sharded=model.sharded)
            model.head = chunked_head(model.module, parallel, sharded=model.sharded)
            return model
        except (Leak, NotPacked) as error:
            reason = str(error)
        del model  # there is not always room for two
    del module
    LOG.warning("rows of %s are padded, not packed: %s", name, reason)
    model = _build(spec, parallel, seed, *build_on_meta(folder, spec, plain=True), pad=True)
    check_rows(model.module, model.rows, parallel, sharded=model.sharded)
    return model


def _build(spec: Model, parallel: ParallelSpec, seed: int, module: Any, origin: str, *, pad: bool) -> HfModel:
    """Of what `build_on_meta` made. With `pad`, that has Transformers' own attention (or the recipe's), which
    reads the padding's mask."""
    folder = model_folder(spec.path, spec.revision)
    files = weight_files(staged_folder(spec))
    transforms = transforms_of(module)  # by class name, which sharding changes
    choose_trained(module, spec.train, spec.freeze)
    kind = HfModel
    if spec.lora is not None:
        from hpc_rl.models.hf import adapted  # it imports this module, and PEFT, which takes seconds

        adapted.inject(module, spec, parallel)
        kind = adapted.AdaptedModel
    if module.config.model_type == "mllama":
        close_cross_attention(module)
    if parallel.activation_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    sharded = needs_sharding(parallel)
    if sharded:
        shard(module, parallel)
    home = torch.device("cpu") if parallel.cpu_offload else parallel.device
    materialise(module, home)
    if spec.lora is None:
        load_weights(module, files, transforms)
    else:
        adapted.load(module, files, transforms, spec.lora, seed)
    if home != parallel.device:
        move_buffers(module, parallel.device)
    _check_ties(module)
    module.train()
    model = kind(module, folder, getattr(torch, spec.dtype), sharded)
    model.rows = padded if pad else packed
    model.needs_media = parallel.data_parallel > 1 and has_vision(module.config)
    LOG.info("%s: rows %s, attention %s", origin, "padded" if pad else "packed", _attention(module))
    return model


def _attention(module: Any) -> str:
    return str(module.config.get_text_config()._attn_implementation)


def skeleton(spec: Model) -> tuple[Any, Path]:
    """`(module on meta, model folder)`: names, shapes and their way to the file's names; no weights."""
    folder = model_folder(spec.path, spec.revision)
    module, _ = build_on_meta(folder, spec)
    resolve_names(module, weight_files(folder), transforms_of(module))
    if spec.lora is not None:
        from hpc_rl.models.hf import lora

        lora.inject(module, spec.lora, spec.path)
    return module, folder


def _check_ties(module: Any) -> None:
    for copy, original in module.all_tied_weights_keys.items():
        assert module.get_parameter(copy) is module.get_parameter(original), f"{copy} is not {original}"
