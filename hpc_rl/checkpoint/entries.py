"""Which pieces of which tensors a rank writes, as plain data; and DCP's metadata from everyone's pieces.

torch's own planning gathers pickled plans over a process group; here every rank decides alone (a shard
is its own, a replicated tensor belongs to the lowest rank), so that a save needs no collective at
all and cannot interleave with those of training.
"""

from __future__ import annotations

from pathlib import Path
from pickle import dumps

import msgspec
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor

from hpc_rl.models.blocks import held_blocks, own_blocks

PIECES = ".pieces.json"


class Piece(msgspec.Struct):
    """A block of tensor `name`: `shape` at `offset` of the whole (`size`). `file`, `start`, `length` say
    where its item is; its own bytes begin at `at` of the file, and of the staging buffer alike."""

    name: str
    dtype: str
    size: list[int]
    shape: list[int]
    offset: list[int]
    at: int = 0
    file: str = ""
    start: int = 0
    length: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count * self.torch_dtype.itemsize


def own_pieces(state: dict[str, Tensor], rank: int) -> list[tuple[Piece, Tensor]]:
    """What this rank writes of `state`, with the local tensors. No communication.

    Of a sharded tensor: its blocks, if it is the first holder of them. Of a plain tensor: everything if the
    name ends with `_{rank}` (per-rank state), or if it is rank 0 (the tensor is equal on all ranks).
    """
    found = []
    for name, value in state.items():
        dtype, local = str(value.dtype).removeprefix("torch."), value.detach()
        if isinstance(value, DTensor):
            blocks, local = own_blocks(value), value.to_local().detach()
        elif rank == 0 or per_rank(name, rank):
            blocks = held_blocks(value)
        else:
            continue
        for block in blocks:
            piece = Piece(name, dtype, list(value.shape), list(block.shape), list(block.start))
            found.append((piece, local[block.of_local()]))
    return found


def per_rank(name: str, rank: int) -> bool:
    """Whether `name` is state of this rank alone, such as `rng_3`."""
    return name.endswith(f"_{rank}") and name.rpartition("_")[0] in ("rng", "rng_cuda")


def metadata_of(ranks: list[list[Piece]]) -> Metadata:
    """DCP's metadata for the written pieces of all ranks.

    Raises ValueError when the pieces of a tensor do not make it up exactly.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    filled: dict[str, int] = {}
    for pieces in ranks:
        for piece in pieces:
            size = torch.Size(piece.size)
            entry = tensors.setdefault(
                piece.name, TensorStorageMetadata(TensorProperties(dtype=piece.torch_dtype), size, [])
            )
            if entry.size != size:
                raise ValueError(
                    f"{piece.name} has size {list(entry.size)} on one rank and {piece.size} on another"
                )
            index = MetadataIndex(piece.name, torch.Size(piece.offset), len(entry.chunks))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)))
            storage[index] = _StorageInfo(piece.file, piece.start, piece.length)
            filled[piece.name] = filled.get(piece.name, 0) + torch.Size(piece.shape).numel()
    for name, count in filled.items():
        if count != tensors[name].size.numel():
            raise ValueError(f"{name}: {count} of {tensors[name].size.numel()} elements were written")
    return Metadata(
        state_dict_metadata=dict(tensors),
        planner_data={name: (name,) for name in tensors},  # what torch's own converters look up
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )


# --- on disk -------------------------------------------------------------------------------------------
def encode_pieces(ranks: list[list[Piece]]) -> tuple[bytes, bytes]:
    """`(ours, DCP's)`: the pieces of all ranks as JSON, which we read, and DCP's `.metadata`, a pickle that
    only plain DCP reads: a checkpoint may have come from a place that others can write to."""
    return msgspec.json.encode(ranks), dumps(metadata_of(ranks))


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a `policy/` folder. Raises FileNotFoundError, or ValueError for a damaged file."""
    return metadata_of(msgspec.json.decode((folder / PIECES).read_bytes(), type=list[list[Piece]]))
