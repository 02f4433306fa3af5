"""Reading tensors of safetensors files straight into the memory where they belong.

Plain reads, not a memory map: page faults of a map come a few pages at a time, which is slow on a cluster's
filesystem, and a map would need another copy. What must be cast or moved to a GPU goes through one small
buffer. The format is in `checkpoint/export_files.py`.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hpc_rl.models.base import ModelError

BUFFER_BYTES = 8 << 20
MIN_RUN_BYTES = 4096  # a page: of less, the whole page comes from the file anyway
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file


@dataclass(frozen=True)
class _Block:
    """A tensor of `shape` in the file, from byte `at` on: all of `name`, or a row of it."""

    handle: int
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    def row(self, number: int) -> _Block:
        return replace(self, shape=self.shape[1:], at=self.at + number * self.pitch)


class Reader:
    """Tensors of several safetensors files by name: whole, by rows of the first dimension, or a block.
    `nbytes` counts what was read."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, tuple[int, dict[str, _Entry]]] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.nbytes = 0

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def tensor(self, name: str) -> Tensor:
        """All of `name`, in memory of its own."""
        _, entry = self._find(name)
        found = torch.empty(entry.shape, dtype=entry.dtype)
        self.rows_into(found, name, 0)
        return found

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        _, entry = self._find(name)
        found = torch.empty((stop - start, *entry.shape[1:]), dtype=entry.dtype)
        self.rows_into(found, name, start)
        return found

    def empty(self, name: str) -> Tensor:
        """A tensor like `name`, without values."""
        _, entry = self._find(name)
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def rows_into(self, target: Tensor, name: str, start: int) -> None:
        """Fill `target` with as many rows of `name` as it has, from row `start` on; cast and moved as
        `target` is."""
        self.block_into(target, name, (start,) + (0,) * (target.dim() - 1))

    def block_into(self, target: Tensor, name: str, offset: tuple[int, ...]) -> None:
        """Fill `target` with the block of `name` at `offset`, as large as `target`; cast and moved as it is.

        Only the bytes of the block are read, or whole rows where the pieces of rows would be shorter than
        a page. Needs one buffer of BUFFER_BYTES at most.
        """
        handle, entry = self._find(name)
        if target.dim() == 0:
            target, offset, entry = target.reshape(1), (0,), replace(entry, shape=(1,))
        if target.numel():
            self._block(_Block(handle, name, entry.dtype, entry.shape, entry.start), target, offset)

    def _block(self, file: _Block, target: Tensor, offset: tuple[int, ...]) -> None:
        own, full = tuple(target.shape), file.shape
        if own[1:] == full[1:]:
            self._pieces(file, target, file.at + offset[0] * file.pitch)
        elif own[2:] == full[2:]:
            self._columns(file, target, offset)
        else:
            for row in range(own[0]):
                self._block(file.row(offset[0] + row), target[row], offset[1:])

    def _pieces(self, file: _Block, target: Tensor, at: int) -> None:
        """All of `target` is in one piece of the file."""
        if _is_room(target, file.dtype):
            self._read(file, _bytes_of(target), at)
            return
        row = prod(target.shape[1:]) * file.dtype.itemsize
        if row > BUFFER_BYTES and target.dim() > 1:
            for number in range(target.shape[0]):
                self._pieces(file, target[number], at + number * row)
            return
        step = max(1, BUFFER_BYTES // row)
        for first in range(0, target.shape[0], step):
            part = target[first : first + step]
            piece = self._staging(part.numel(), file.dtype, target.is_cuda).view(part.shape)
            self._read(file, _bytes_of(piece), at + first * row)
            part.copy_(piece)

    def _columns(self, file: _Block, target: Tensor, offset: tuple[int, ...]) -> None:
        """Each row of `target` is a run within a row of the file."""
        run = prod(target.shape[1:]) * file.dtype.itemsize
        rows = file.at + offset[0] * file.pitch
        own = rows + offset[1] * prod(file.shape[2:]) * file.dtype.itemsize
        if max(run, file.pitch) > BUFFER_BYTES:
            for row in range(target.shape[0]):
                self._pieces(file, target[row], own + row * file.pitch)
            return
        whole = run < MIN_RUN_BYTES
        if not whole and _is_room(target, file.dtype):
            self._runs(file, target, own)
            return
        step = BUFFER_BYTES // (file.pitch if whole else run)
        for first in range(0, target.shape[0], step):
            part, skip = target[first : first + step], first * file.pitch
            width = file.shape[1] if whole else part.shape[1]
            shape = (part.shape[0], width, *part.shape[2:])
            piece = self._staging(prod(shape), file.dtype, target.is_cuda).view(shape)
            if whole:
                self._read(file, _bytes_of(piece), rows + skip)
                piece = piece.narrow(1, offset[1], part.shape[1])
            else:
                self._runs(file, piece, own + skip)
            part.copy_(piece)

    def _runs(self, file: _Block, target: Tensor, at: int) -> None:
        room, count = _bytes_of(target), target.shape[0]
        run = len(room) // count
        for row in range(count):
            self._read(file, room[row * run : (row + 1) * run], at + row * file.pitch)

    def close(self) -> None:
        for handle, _ in self._open.values():
            os.close(handle)
        self._open.clear()

    def _staging(self, count: int, dtype: torch.dtype, pinned: bool) -> Tensor:
        nbytes = count * dtype.itemsize
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(max(nbytes, BUFFER_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer[:nbytes].view(dtype)

    def _read(self, file: _Block, room: memoryview, at: int) -> None:
        self.nbytes += len(room)
        while room:
            count = os.preadv(file.handle, [room], at)
            if count == 0:
                raise ModelError(
                    f"{self._files[file.name]} ends within {file.name}; is the download complete?"
                )
            room, at = room[count:], at + count

    def _find(self, name: str) -> tuple[int, _Entry]:
        path = self._files[name]
        if path not in self._open:
            handle = os.open(path, os.O_RDONLY)
            self._open[path] = (handle, _entries(handle, path))
        handle, entries = self._open[path]
        return handle, entries[name]


def _is_room(target: Tensor, dtype: torch.dtype) -> bool:
    """Whether bytes of a file with `dtype` can be read straight into `target`."""
    return target.dtype == dtype and target.device.type == "cpu" and target.is_contiguous()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    # Dimensions of one place may have any stride, which `view` as bytes refuses.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy().data)


def _entries(handle: int, path: Path) -> dict[str, _Entry]:
    (length,) = struct.unpack("<Q", os.pread(handle, 8, 0))
    header = json.loads(os.pread(handle, length, 8))
    header.pop("__metadata__", None)
    unknown = {str(entry["dtype"]) for entry in header.values()} - set(DTYPES)
    if unknown:
        raise ModelError(f"{path} has tensors of dtype {', '.join(sorted(unknown))}, which cannot be loaded")
    return {
        name: _Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
