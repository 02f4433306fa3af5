"""Reading tensors of safetensors files straight into the memory where they belong.

Plain reads, not a memory map: page faults of a map come a few pages at a time, which is slow on a cluster's
filesystem, and a map would need another copy. What must be cast or moved to a GPU goes through one small
buffer. The format is in `checkpoint/export_files.py`.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hpc_rl.models.base import ModelError

BUFFER_BYTES = 8 << 20
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

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize


class Reader:
    """Tensors of several safetensors files by name; whole or by rows of the first dimension."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._open: dict[Path, tuple[int, dict[str, _Entry]]] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)

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

    def rows_into(self, target: Tensor, name: str, start: int) -> None:
        """Fill `target` with as many rows of `name` as it has, from row `start` on; cast and moved as
        `target` is."""
        handle, entry = self._find(name)
        at = entry.start + start * entry.row_bytes
        if target.dtype == entry.dtype and target.device.type == "cpu" and target.is_contiguous():
            self._read(handle, target, at, name)
            return
        rows = target.shape[0] if target.dim() else 1
        step = max(1, BUFFER_BYTES // max(1, entry.row_bytes))
        flat = target if target.dim() else target.reshape(1)
        for first in range(0, rows, step):
            part = flat[first : first + step]
            buffer = self._staging(part.numel() * entry.dtype.itemsize, target.is_cuda)
            piece = buffer.view(entry.dtype).view(part.shape)
            self._read(handle, piece, at + first * entry.row_bytes, name)
            part.copy_(piece)

    def close(self) -> None:
        for handle, _ in self._open.values():
            os.close(handle)
        self._open.clear()

    def _staging(self, nbytes: int, pinned: bool) -> Tensor:
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(max(nbytes, BUFFER_BYTES), dtype=torch.uint8, pin_memory=pinned)
        return self._buffer[:nbytes]

    def _read(self, handle: int, target: Tensor, at: int, name: str) -> None:
        if target.numel() == 0:
            return
        room = target.reshape(-1).view(torch.uint8).numpy().data
        while room:
            count = os.preadv(handle, [room], at)
            if count == 0:
                raise ModelError(f"{self._files[name]} ends within {name}; is the download complete?")
            room, at = room[count:], at + count

    def _find(self, name: str) -> tuple[int, _Entry]:
        path = self._files[name]
        if path not in self._open:
            handle = os.open(path, os.O_RDONLY)
            self._open[path] = (handle, _entries(handle, path))
        handle, entries = self._open[path]
        return handle, entries[name]


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
