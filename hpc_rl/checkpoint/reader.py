"""Reads of a checkpoint that take only the bytes that are asked for, straight into the tensors.

torch's own reader loads every saved chunk that a wanted block touches, whole, and cuts the block out. Ours
knows where the bytes lie in each item (`image`): a block of whole rows is read into its tensor without any
copy in between; others go through a buffer of at most `BUCKET`
bytes. The metadata is read from our own JSON (`entries.read_metadata`), no pickle is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor
from torch.futures import Future

from hpc_rl.checkpoint.entries import read_metadata
from hpc_rl.checkpoint.image import data_offset
from hpc_rl.models.blocks import held_blocks

BUCKET = 32 << 20
HEAD = 4096  # more than the archive's bytes before the data
RUN = 4096  # shorter pieces of rows are not worth a system call each


class BlockPlanner(DefaultLoadPlanner):
    """DCP's planner for tensors of which a rank may hold several blocks (`blocks.py`)."""

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        self._blocks = {name: held_blocks(value) for name, value in self.state_dict.items()}
        items: list[ReadItem] = []
        for name, blocks in self._blocks.items():
            entry = self.metadata.state_dict_metadata[name]
            assert isinstance(entry, TensorStorageMetadata)
            wanted = [ChunkStorageMetadata(torch.Size(b.start), torch.Size(b.shape)) for b in blocks]
            items += create_read_items_for_chunk_list(name, entry, wanted)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        local = value.to_local() if isinstance(value, DTensor) else value
        block = next(b for b in self._blocks[index.fqn] if index.offset == torch.Size(b.start))
        return local[block.of_local()]


class RangeReader(FileSystemReader):
    """DCP's reader for what `Saver` wrote. Any sharding; only the ranges of this rank are read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._entries = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR, "our checkpoints hold tensors only"
            files.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in files.items():
            path = os.path.join(self.path, name)
            items.sort(key=lambda item: self.storage_data[item.storage_index].offset)
            with open(path, "rb", buffering=0) as file:
                for item in items:
                    target = planner.resolve_tensor(item).detach()
                    self._read(_File(file.fileno(), path), item, target)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, file: _File, item: ReadItem, target: Tensor) -> None:
        entry = self._entries[item.storage_index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        chunk = next(c for c in entry.chunks if c.offsets == item.storage_index.offset)
        if math.prod(item.lengths) == 0:
            return
        place = self.storage_data[item.storage_index]
        at = data_offset(file.head(place.offset, min(HEAD, place.length)))
        if at < 0:
            raise OSError(f"{file.path}: no tensor at byte {place.offset}, where {item.storage_index.fqn} is")
        block = _Block(
            place.offset + at, entry.properties.dtype, chunk.sizes, item.storage_offsets, item.lengths
        )
        block.read(file, target)


class _File:
    def __init__(self, handle: int, path: str) -> None:
        self.handle, self.path = handle, path

    def head(self, start: int, nbytes: int) -> bytes:
        return os.pread(self.handle, nbytes, start)

    def fill(self, tensor: Tensor, start: int) -> None:
        """Fill a contiguous CPU tensor with the bytes from `start` on. Raises OSError at the file's end."""
        memory: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(memory):
            count = os.preadv(self.handle, [memory[done:]], start + done)
            if count == 0:
                raise OSError(f"{self.path} ends at byte {start + done}, inside a tensor")
            done += count


class _Block:
    """A box (`offsets`, `lengths`) of a saved chunk of shape `shape` whose bytes begin at `start`."""

    def __init__(
        self,
        start: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        offsets: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        # At least two dimensions: rows, and what is in a row.
        pad = max(0, 2 - len(shape))
        self.start, self.dtype = start, dtype
        self.shape = [*shape, *[1] * pad]
        self.offsets = [*offsets, *[0] * pad]
        self.lengths = [*lengths, *[1] * pad]
        self.row = math.prod(self.shape[1:]) * dtype.itemsize
        self.whole_rows = self.lengths[1:] == self.shape[1:]

    def read(self, file: _File, target: Tensor) -> None:
        target = target.reshape(self.lengths) if target.dim() < 2 else target
        direct = target.dtype == self.dtype and target.device.type == "cpu" and target.is_contiguous()
        first = self.start + self.offsets[0] * self.row
        if self.whole_rows and direct:
            file.fill(target, first)
            return
        # One contiguous run per row, where only the second dimension is cut and it is long enough.
        run = self.lengths[1] * math.prod(self.shape[2:]) * self.dtype.itemsize
        runs = not self.whole_rows and self.lengths[2:] == self.shape[2:] and run >= RUN
        width = [self.lengths[1], *self.shape[2:]] if runs else self.shape[1:]
        count = max(1, BUCKET // (run if runs else self.row))
        bucket = torch.empty([min(count, self.lengths[0]), *width], dtype=self.dtype)
        for begin in range(0, self.lengths[0], count):
            rows = bucket[: min(count, self.lengths[0] - begin)]
            if runs:
                skip = self.offsets[1] * math.prod(self.shape[2:]) * self.dtype.itemsize
                for number, row in enumerate(rows):
                    file.fill(row, first + (begin + number) * self.row + skip)
            else:
                file.fill(rows, first + begin * self.row)
                for dim in range(1, len(self.shape)):
                    rows = rows.narrow(dim, self.offsets[dim], self.lengths[dim])
            target[begin : begin + len(rows)].copy_(rows)
