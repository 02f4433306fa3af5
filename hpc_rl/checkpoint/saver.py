"""Asynchronous saves: stage into a reused shared buffer, let the writer process write, finish on rank 0.

The stall of a save is one copy of this rank's shards into memory that both processes map. No
collective is involved: each rank's writer leaves a report file beside its data, and rank 0 makes DCP's
`.metadata` when all reports are there. One save is in flight per rank: the next one waits for it.
"""

from __future__ import annotations

import logging
import mmap
import os
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from hpc_rl.checkpoint.entries import Piece, metadata_of, own_pieces
from hpc_rl.checkpoint.writer import Answer, Report, Request, map_buffer, view, write_report

LOG = logging.getLogger("hpc_rl.checkpoint")
ALIGN = 64


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message names the rank or file."""


@dataclass
class SaveResult:
    """`seconds` from the start of staging to the finished `.metadata`; `error` is empty on success."""

    step: int
    seconds: float
    error: str = ""


@dataclass
class _Flight:
    step: int
    folder: Path
    began: float


class Saver:
    """One per rank. `token` tells the report files of this start apart from those of an earlier one."""

    def __init__(self, rank: int, world_size: int, token: str, timeout_s: float = 1200.0) -> None:
        self.rank, self.world_size, self.token, self.timeout_s = rank, world_size, token, timeout_s
        self._handle = os.memfd_create(f"hpc-rl-staging-{rank}", 0)
        self._size = 0
        self._buffer: mmap.mmap | None = None
        self._process: subprocess.Popen[str] | None = None
        self._flight: _Flight | None = None
        self._ended: list[SaveResult] = []
        self._unfinished: list[_Flight] = []  # on rank 0: waiting for the reports of the others

    def prepare(self) -> None:
        """Start the writer now: its start (an import of torch) must not be the stall of the first save."""
        self._writer()

    def stage(self, step: int, folder: Path, state: dict[str, Tensor]) -> float:
        """Copy this rank's part of `state` and start writing it to `folder`; the stall in seconds.

        Waits first for an earlier save that is still being written; how it ended comes with the next
        `poll`. Raises SaveError if it takes longer than the time limit.
        """
        began = time.monotonic()
        self._settle(began + self.timeout_s)
        pieces = self._copy(own_pieces(state, self.rank))
        request = Request(str(folder), f"__{self.rank}_", self._report(self.rank), self._size, pieces)
        process = self._writer()
        assert process.stdin is not None
        self._flight = _Flight(step, folder, began)
        try:
            process.stdin.write(msgspec.json.encode(request).decode() + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            LOG.error("the writer process of rank %d is gone", self.rank)  # `poll` says so of this save
        if self.rank == 0:
            self._unfinished.append(self._flight)
        return time.monotonic() - began

    def poll(self) -> list[SaveResult]:
        """Saves that ended since the last call. On ranks other than 0 only failures of their own."""
        self._take_answer(0.0)
        results, self._ended = self._ended, []
        for flight in list(self._unfinished):
            results += self._finish(flight)
        return results

    def wait(self) -> list[SaveResult]:
        """Block until nothing is in flight (on rank 0: on any rank). Bounded by the time limit."""
        deadline = time.monotonic() + self.timeout_s
        results = self.poll()
        while self._flight is not None or self._unfinished:
            if time.monotonic() > deadline:
                raise SaveError(f"after {self.timeout_s:.0f} s {self._missing()}")
            time.sleep(0.01)
            results += self.poll()
        return results

    def close(self) -> None:
        """End the writer once it has finished what it was given."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(30.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    # --- staging -----------------------------------------------------------------------------------
    def _copy(self, parts: list[tuple[Piece, Tensor]]) -> list[Piece]:
        end = 0
        for piece, _ in parts:
            piece.at = end
            end += -(-piece.nbytes // ALIGN) * ALIGN
        if end > self._size:
            # Kept for the life of the run: fresh pages cost far more than the copy itself.
            os.ftruncate(self._handle, end)
            self._buffer, self._size = map_buffer(self._handle, end), end
        for piece, local in parts:
            if piece.nbytes:
                assert self._buffer is not None
                view(self._buffer, piece).copy_(local, non_blocking=True)
        if any(local.is_cuda for _, local in parts):
            torch.cuda.synchronize()
        return [piece for piece, _ in parts]

    def _writer(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hpc_rl.checkpoint.writer", str(self._handle)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=(self._handle,),
            )
        return self._process

    # --- the end of a save ---------------------------------------------------------------------------
    def _settle(self, deadline: float) -> None:
        """The buffer is free once the writer has answered."""
        if self._flight is not None and not self._take_answer(max(0.0, deadline - time.monotonic())):
            raise SaveError(f"the writer of rank {self.rank} has not finished step {self._flight.step}")

    def _take_answer(self, wait_s: float) -> bool:
        """Whether the writer is idle now; a failure is noted for `poll` and left for rank 0."""
        if self._flight is None:
            return True
        error = self._answer(wait_s)
        if error is None:
            return False
        flight, self._flight = self._flight, None
        if error:
            self._tell(flight, error)
            self._ended.append(self._failed(flight, error))
        return True

    def _answer(self, wait_s: float) -> str | None:
        """None while the writer works, "" when it has written, else what went wrong."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(wait_s):
                return None
        line = process.stdout.readline()
        if line:
            return msgspec.json.decode(line, type=Answer).error
        code = process.wait(10.0)
        self._process = None
        return f"the writer process of rank {self.rank} ended with code {code}"

    def _tell(self, flight: _Flight, error: str) -> None:
        """Leave the failure for rank 0, if the filesystem lets us; else its time limit is the end."""
        try:
            flight.folder.mkdir(parents=True, exist_ok=True)
            write_report(flight.folder / self._report(self.rank), Report([], error))
        except OSError as lost:
            LOG.error("the failure could not be left for rank 0: %s", lost)

    def _report(self, rank: int) -> str:
        return f".rank_{rank}.{self.token}.json"

    def _finish(self, flight: _Flight) -> list[SaveResult]:
        reports = [flight.folder / self._report(rank) for rank in range(self.world_size)]
        if not all(report.is_file() for report in reports):
            if time.monotonic() - flight.began > self.timeout_s:
                return [self._failed(flight, self._missing())]
            return []
        try:
            found = [msgspec.json.decode(r.read_bytes(), type=Report) for r in reports]
            errors = [f"rank {rank}: {r.error}" for rank, r in enumerate(found) if r.error]
            if errors:
                return [self._failed(flight, "; ".join(errors))]
            metadata, written = metadata_of([r.pieces for r in found])
            FileSystemWriter(flight.folder, sync_files=True).finish(metadata, written)
        except (OSError, ValueError) as error:
            return [self._failed(flight, str(error))]
        for report in flight.folder.glob(".rank_*.json"):  # those of an earlier start, too
            report.unlink()
        self._unfinished.remove(flight)
        return [SaveResult(flight.step, time.monotonic() - flight.began)]

    def _failed(self, flight: _Flight, error: str) -> SaveResult:
        if flight in self._unfinished:
            self._unfinished.remove(flight)
        LOG.error("checkpoint of step %d: %s", flight.step, error)
        return SaveResult(flight.step, time.monotonic() - flight.began, error)

    def _missing(self) -> str:
        for flight in self._unfinished:
            late = [r for r in range(self.world_size) if not (flight.folder / self._report(r)).is_file()]
            if late:
                return f"policy ranks {late} have not written their part of step {flight.step}"
        return f"the writer of rank {self.rank} has not finished"
