"""Weights from safetensors into a sharded model, never the whole model in one process at once.

Every rank reads its own part of each tensor, straight into the shard (`sources.py`: also of those that are
put together from several). Names and conversions are transformers' own (`core_model_loading`), so whatever
`from_pretrained` reads is read here.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from hpc_rl.models.base import ModelError
from hpc_rl.models.blocks import held_blocks
from hpc_rl.models.hf.conversion import way_back
from hpc_rl.models.hf.reading import Reader
from hpc_rl.models.hf.sources import InFile, Source, convert

LOG = logging.getLogger("hpc_rl.models")


def load_weights(
    module: Any, files: dict[str, Path], transforms: list[Any], targets: dict[str, Tensor] | None = None
) -> None:
    """Fill the materialised parameters and persistent buffers of `module` from `files`.

    `transforms` is `conversion.transforms_of` the module before it was sharded; those that
    matched are left on the module for the way back. `targets` are the tensors to fill by the names of the
    plain model (null: those of `module` itself). Raises ModelError when one is not in the files or has
    another shape there.
    """
    if targets is None:
        targets = module.state_dict(keep_vars=True)
    began = time.monotonic()
    tied = set(module.all_tied_weights_keys)
    plan, unexpected = plan_of(module, files, transforms, targets)
    reader = Reader(files)
    loaded: set[str] = set()
    with torch.no_grad():
        for first, mapping in plan.items():
            for name, source in realised(module, reader, first, mapping):
                if name in tied and name in loaded:
                    continue
                if name in targets:
                    fill(targets[name], source, name)
                    loaded.add(name)
    reader.close()
    LOG.info("%.2f GB of the files read in %.1f s", reader.nbytes / 1e9, time.monotonic() - began)
    module._weight_conversions = way_back(transforms)
    _check_complete(module, targets, loaded, tied)
    ignored = "|".join(module._keys_to_ignore_on_load_unexpected or []) or r"rotary_emb\.inv_freq"
    unexpected = [name for name in unexpected if not re.search(ignored, name)]
    if unexpected:
        LOG.warning("%d tensors of the files are not used: %s", len(unexpected), ", ".join(unexpected[:5]))


def resolve_names(module: Any, files: dict[str, Path], transforms: list[Any]) -> None:
    """Only note on `module` which of the possible spellings `files` use."""
    plan_of(module, files, transforms, module.state_dict(keep_vars=True))
    module._weight_conversions = way_back(transforms)


def plan_of(
    module: Any, files: dict[str, Path], transforms: list[Any], targets: dict[str, Tensor]
) -> tuple[dict[str, Any], list[str]]:
    """First target name -> the transform that makes it, holding the names of its source tensors."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = module.base_model_prefix
    plan: dict[str, Any] = {}
    unexpected = []
    for key in sorted(files, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, targets)
        if name not in targets and key in targets:
            name, pattern = rename_source_key(key, [], [], prefix, targets)
        if name not in targets:
            unexpected.append(key)
        elif pattern is None:
            plan.setdefault(name, WeightRenaming(key, name)).add_tensor(name, key, key, key)
        else:
            mapping = plan.setdefault(name, deepcopy(by_pattern[pattern]))
            mapping.add_tensor(name, key, pattern, key)
    return plan, unexpected


def realised(module: Any, reader: Reader, first: str, mapping: Any) -> Iterator[tuple[str, Source]]:
    """Name in memory, where its numbers are. Nothing is read yet, but for conversions that must be whole."""
    if isinstance(mapping, WeightRenaming):
        (keys,) = mapping.collected_tensors.values()
        yield first, InFile(reader, str(keys[0]))
        return
    yield from convert(module, reader, first, mapping).items()


def fill(target: Tensor, source: Source, name: str) -> None:
    """Read what this rank has of `target`: one block, or several where fused halves are split each."""
    if tuple(target.shape) != source.shape:
        raise ModelError(
            f"{name} is {list(source.shape)} in the files, but config.json makes it {list(target.shape)}"
        )
    local = target.to_local() if isinstance(target, DTensor) else target.data
    if local.numel() == 0:
        return
    for block in held_blocks(target):
        source.fill(local[block.of_local()], block.start)


def _check_complete(module: Any, targets: dict[str, Tensor], loaded: set[str], tied: set[str]) -> None:
    ignored = "|".join(module._keys_to_ignore_on_load_missing or []) or "(?!)"
    missing = [n for n in targets if n not in loaded and n not in tied and not re.search(ignored, n)]
    if missing:
        raise ModelError(
            f"{len(missing)} tensors of {type(module).__name__} are not in the safetensors files: "
            f"{', '.join(missing[:5])}; is this checkpoint for another architecture?"
        )


def materialise(module: Any, device: torch.device) -> None:
    """Give a meta module storage on `device`: parameters empty, ties kept, computed buffers made anew.

    Buffers that no file holds (rotary frequencies, embedding scales) are garbage after `to_empty`
    and often look right. They are poisoned first and must all have been written by the model's own
    initialisation; a buffer that was not is a ModelError. Booleans have no value to spare for poison: they
    are made twice, out of opposite garbage, and must be the same.
    """
    module.to_empty(device=device)
    module.tie_weights()
    computed = dict(module.named_non_persistent_buffers())
    owners = sorted({name.rpartition(".")[0] for name in computed})
    _make_anew(module, computed, owners, flag=True)
    flags = {name: buffer.clone() for name, buffer in computed.items() if buffer.dtype == torch.bool}
    if flags:
        _make_anew(module, computed, owners, flag=False)
    for name, buffer in computed.items():
        poison = buffer != flags[name] if name in flags else _poisoned(buffer)
        if bool(poison.any()):
            raise ModelError(f"buffer {name} of {type(module).__name__} is not made by its _init_weights")


@torch.no_grad()
def _make_anew(module: Any, computed: dict[str, Tensor], owners: list[str], *, flag: bool) -> None:
    """Poison `computed` (booleans get `flag`), and let the model's own initialisation write them."""
    for buffer in computed.values():
        if buffer.dtype == torch.bool:
            buffer.fill_(flag)
        elif buffer.is_floating_point():
            buffer.fill_(float("nan"))
        else:
            buffer.fill_(torch.iinfo(buffer.dtype).min)
    for owner in owners:
        _owning_model(module, owner)._init_weights(module.get_submodule(owner))


def _poisoned(buffer: Tensor) -> Tensor:
    return buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min


def move_buffers(module: Any, device: torch.device) -> None:
    """FSDP brings offloaded parameters to the device when they are needed, but not buffers."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)


def _owning_model(module: Any, name: str) -> Any:
    """The innermost pretrained model around submodule `name`: it knows how to initialise its parts."""
    from transformers import PreTrainedModel

    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        candidate = module.get_submodule(".".join(parts[:length]))
        if isinstance(candidate, PreTrainedModel):
            return candidate
    return module
