"""Reading a checkpoint: into any sharding, by every rank alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from hpc_rl.checkpoint.entries import PIECES, read_metadata
from hpc_rl.checkpoint.reader import BlockPlanner, RangeReader


class CheckpointError(RuntimeError):
    """The checkpoint on disk does not fit what is to be restored."""


def tensors_of(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Names of the tensors in `folder` (a `policy/` folder) with their sizes and dtypes."""
    try:
        metadata = read_metadata(folder)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no finished checkpoint: {error}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / PIECES} cannot be read: {error}") from error
    return {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def load_into(folder: Path, state: dict[str, Tensor], optional: frozenset[str] = frozenset()) -> set[str]:
    """Fill the tensors of `state` in place from `folder`; the names that were loaded.

    Sharded tensors may be sharded in any other way than when they were saved; each rank reads only what
    it holds. Names in `optional` may be absent. Raises CheckpointError for a missing name, a size that
    differs, or files that cannot be read.
    """
    saved = tensors_of(folder)
    missing = sorted(name for name in state if name not in saved and name not in optional)
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors: {', '.join(missing[:5])}")
    wanted = {name: value for name, value in state.items() if name in saved}
    for name, value in wanted.items():
        if saved[name].size != value.shape:
            raise CheckpointError(
                f"{name} is {list(saved[name].size)} in {folder}, but {list(value.shape)} is needed"
            )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist is meant
        targets: dict[str, Any] = {name: value.detach() for name, value in wanted.items()}
        try:
            load(targets, storage_reader=RangeReader(folder), planner=BlockPlanner(), no_dist=True)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(f"{folder} cannot be read: {_first_line(error)}") from error
    return set(wanted)


def _first_line(error: BaseException) -> str:
    """What went wrong, without the traceback of DCP's own exception."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]
