"""The writer process: takes staged tensors from shared memory and writes them as DCP files.

    python -m hpc_rl.checkpoint.writer FD

FD is an inherited memory file (memfd). Requests come as lines of JSON on stdin, answers go to stdout;
nothing is pickled. A process of its own, because a writing thread holds the interpreter that training
needs. It ends when its stdin closes, so it never outlives the trainer.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem

from hpc_rl.checkpoint.entries import Piece, save_plan
from hpc_rl.checkpoint.layout import write_atomic


class Request(msgspec.Struct):
    """Write `pieces` of the buffer (`nbytes` long) to `folder`; the account goes to `report` in it."""

    folder: str
    prefix: str
    report: str
    nbytes: int
    pieces: list[Piece]


class Report(msgspec.Struct):
    """What one rank wrote, or why it could not: read by rank 0."""

    pieces: list[Piece]
    error: str = ""


class Answer(msgspec.Struct):
    seconds: float = 0.0
    error: str = ""


def map_buffer(handle: int, nbytes: int) -> mmap.mmap:
    """The first `nbytes` of the memory file, shared between trainer and writer."""
    return mmap.mmap(handle, nbytes)


def view(buffer: mmap.mmap, piece: Piece) -> Tensor:
    """The piece's block of the buffer as a tensor (no copy)."""
    if piece.nbytes == 0:
        return torch.empty(piece.shape, dtype=piece.torch_dtype)
    count = piece.nbytes // piece.torch_dtype.itemsize
    flat = torch.frombuffer(buffer, dtype=piece.torch_dtype, count=count, offset=piece.at)
    return flat.reshape(piece.shape)


class _Staged(DefaultSavePlanner):
    """Answers DCP's writer from the staging buffer."""

    def __init__(self, pieces: list[Piece], buffer: mmap.mmap) -> None:
        super().__init__()
        self._pieces = {(p.name, tuple(p.offset)): p for p in pieces}
        self._buffer = buffer

    def resolve_data(self, write_item: WriteItem) -> Any:
        index = write_item.index
        return view(self._buffer, self._pieces[index.fqn, tuple(index.offset or ())])


def write(request: Request, buffer: mmap.mmap) -> None:
    """Write and sync the files of `request`, then its report (atomically)."""
    folder = Path(request.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if request.pieces:
        plan = save_plan(request.pieces, request.prefix)
        writer = FileSystemWriter(folder, sync_files=True, thread_count=1)
        future = writer.write_data(plan, _Staged(request.pieces, buffer))
        future.wait()
        pieces = {(p.name, tuple(p.offset)): p for p in request.pieces}
        for result in future.value():
            piece = pieces[result.index.fqn, tuple(result.index.offset or ())]
            data = result.storage_data
            piece.file, piece.start, piece.length = data.relative_path, data.offset, data.length
    write_report(folder / request.report, Report(request.pieces))


def write_report(path: Path, report: Report) -> None:
    write_atomic(path, msgspec.json.encode(report).decode())


def serve(handle: int) -> None:
    torch.set_num_threads(1)
    os.nice(5)  # the trainer's and the sampler's threads come first
    # DCP prints nothing, but a warning on stdout would break the protocol.
    answers, sys.stdout = sys.stdout, sys.stderr
    buffer: mmap.mmap | None = None
    for line in sys.stdin:
        request = msgspec.json.decode(line, type=Request)
        began = time.monotonic()
        try:
            if request.nbytes and (buffer is None or len(buffer) != request.nbytes):
                buffer = map_buffer(handle, request.nbytes)
            write(request, buffer or mmap.mmap(-1, 1))
            answer = Answer(time.monotonic() - began)
        except Exception as error:  # noqa: BLE001 -- reported to the trainer, which decides
            traceback.print_exc()
            answer = Answer(error=f"{type(error).__name__}: {error}"[:500])
        print(msgspec.json.encode(answer).decode(), file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
