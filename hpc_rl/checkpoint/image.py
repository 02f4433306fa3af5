"""The image of a rank's DCP file, laid out in the staging buffer before anything is written.

DCP's file is a row of items, each what `torch.save` makes of one tensor: an archive of a few hundred bytes
around the tensor's own. Those bytes depend on dtype and shape alone, so they are put into the buffer
once; a save then copies the tensors into their places and the buffer *is* the file. The writer needs
neither torch nor a second copy: it writes the memory as it is, and `dcp.load` reads it.
"""

from __future__ import annotations

import io
import mmap
from dataclasses import dataclass
from typing import IO, cast

import msgspec
import torch
import xxhash
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

from hpc_rl.checkpoint.entries import Piece

ALIGN = 64  # torch.save aligns data to this, from the start of its archive
PAGE = 4096
_RECORD = b"archive/data/0"


@dataclass(frozen=True)
class Shell:
    """The bytes of an item before and after the tensor's own."""

    head: bytes
    tail: bytes


class _Recorder(io.RawIOBase):
    """Takes what torch.save writes, but not the tensor's bytes."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._parts: list[bytes] = []
        self.head: bytes | None = None

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        size = memoryview(data).nbytes
        if self.head is None:
            head = b"".join(self._parts)
            if data_offset(head) == len(head) and size == self._nbytes:
                self.head, self._parts = head, []
                return size
        self._parts.append(bytes(data))
        return size

    def shell(self) -> Shell:
        rest = b"".join(self._parts)
        if self.head is not None:
            return Shell(self.head, rest)
        assert self._nbytes == 0, "torch.save did not write the tensor where it is looked for"
        return Shell(rest, b"")


def data_offset(head: bytes) -> int:
    """Where the tensor's bytes start in an item that starts with `head`; -1 if that is not in `head`.

    A ZIP local header is 30 bytes, the name, and an extra field that pads up to the data's alignment.
    """
    name = head.find(_RECORD)
    if name < 30 or head[name - 30 : name - 26] != b"PK\x03\x04":
        return -1
    return name + len(_RECORD) + int.from_bytes(head[name - 2 : name], "little")


def shell_of(dtype: torch.dtype, shape: list[int]) -> Shell:
    """What torch.save puts around a contiguous tensor of this dtype and shape."""
    tensor = torch.empty(shape, dtype=dtype)  # never touched: no page of it becomes real
    recorder = _Recorder(tensor.nbytes)
    checked = get_crc32_options()
    set_crc32_options(False)  # the archive's own checksum would be of bytes that are not there yet
    try:
        torch.save(tensor, cast(IO[bytes], recorder))
    finally:
        set_crc32_options(checked)
    return recorder.shell()


def view(buffer: mmap.mmap, piece: Piece) -> Tensor:
    """The piece's block of the buffer as a tensor (no copy)."""
    if piece.nbytes == 0:
        return torch.empty(piece.shape, dtype=piece.torch_dtype)
    count = piece.nbytes // piece.torch_dtype.itemsize
    flat = torch.frombuffer(buffer, dtype=piece.torch_dtype, count=count, offset=piece.at)
    return flat.reshape(piece.shape)


class Image:
    """Places of `pieces` in one file; `nbytes` is its length. `encoded` and `digest` tell it to rank 0."""

    def __init__(self, pieces: list[Piece], file: str) -> None:
        self.pieces, self.nbytes = pieces, 0
        shells: dict[tuple[str, tuple[int, ...]], Shell] = {}
        self._shells: list[Shell] = []
        for piece in pieces:
            key = (piece.dtype, tuple(piece.shape))
            shell = shells.setdefault(key, shells.get(key) or shell_of(piece.torch_dtype, piece.shape))
            piece.file, piece.start = file, -(-self.nbytes // ALIGN) * ALIGN
            piece.at = piece.start + len(shell.head)
            piece.length = len(shell.head) + piece.nbytes + len(shell.tail)
            self.nbytes = piece.start + piece.length
            self._shells.append(shell)
        self.encoded = msgspec.json.encode(pieces)
        self.digest = xxhash.xxh3_64_hexdigest(self.encoded)

    @property
    def room(self) -> int:
        """What the buffer must hold: whole pages, as direct writes take them."""
        return -(-self.nbytes // PAGE) * PAGE

    def fits(self, pieces: list[Piece]) -> bool:
        """Whether `pieces` (not placed yet) are those of this image."""
        return len(pieces) == len(self.pieces) and all(
            (a.name, a.dtype, a.size, a.shape, a.offset) == (b.name, b.dtype, b.size, b.shape, b.offset)
            for a, b in zip(pieces, self.pieces, strict=True)
        )

    def frame(self, buffer: mmap.mmap) -> None:
        """Put everything but the tensors into `buffer`."""
        end = 0
        for piece, shell in zip(self.pieces, self._shells, strict=True):
            buffer[end : piece.start] = bytes(piece.start - end)
            buffer[piece.start : piece.at] = shell.head
            end = piece.start + piece.length
            buffer[end - len(shell.tail) : end] = shell.tail
        buffer[end : self.room] = bytes(self.room - end)
