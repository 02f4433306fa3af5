"""Asynchronous saves: stage into a reused shared buffer, let the writer process write, finish on rank 0.

The stall of a save is one copy of this rank's shards into memory that both processes map. No
collective is involved: each rank's writer leaves a report file beside its data, and rank 0 makes DCP's
`.metadata` when all reports are there. One save is in flight per rank: the next one waits for it, for
`wait_s` at most, and is given up then. No failure here ends the training; each is a result.
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
from typing import Any

import msgspec
import torch
import xxhash
from torch import Tensor

from hpc_rl.checkpoint.entries import PIECES, Piece, encode_pieces, own_pieces
from hpc_rl.checkpoint.image import Image, view
from hpc_rl.checkpoint.manifest import WRITTEN, FileEntry, Written, write_atomic
from hpc_rl.checkpoint.writer import PAGE, Answer, Report, Request, map_buffer

LOG = logging.getLogger("hpc_rl.checkpoint")
KILL_S = 10.0  # for a killed process to end; one that waits for a disk in the kernel does not


@dataclass
class SaveResult:
    """`seconds` from the start of staging to the finished `.metadata`; `error` is empty on success."""

    step: int
    seconds: float
    error: str = ""


@dataclass
class _Flight:
    """One save under way. `number` counts the saves of this start; it is the same on all ranks."""

    step: int
    folder: Path
    number: int
    began: float


class Saver:
    """One per rank. `token` tells the report files of this start apart from those of an earlier one.

    `stage` is a file on the node's own disk to write to before the checkpoint's folder, or None.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        token: str,
        *,
        stage: Path | None = None,
        timeout_s: float = 1200.0,
        wait_s: float = 60.0,
    ) -> None:
        self.rank, self.world_size, self.token, self.stage_file = rank, world_size, token, stage
        self.timeout_s, self.wait_s = timeout_s, wait_s
        self._handle = os.memfd_create(f"hpc-rl-staging-{rank}", 0)
        self._buffer: mmap.mmap | None = None
        self._pinned = False
        self._image: Image | None = None
        self._told: str | None = None  # the layout that the writer knows
        self._process: subprocess.Popen[str] | None = None
        self._count = 0
        self._flight: _Flight | None = None
        self._preparing = 0  # answers to come that are of no save
        self._ended: list[SaveResult] = []
        self._unfinished: list[_Flight] = []  # on rank 0: waiting for the reports of the others
        self._metadata: tuple[list[str], bytes, bytes] = ([], b"", b"")  # of layouts with these digests

    def prepare(self, nbytes: int = 0) -> None:
        """Start the writer now, and let it make `nbytes` of the buffer real while the model is loaded."""
        self._grow(nbytes)
        process = self._writer()
        if nbytes:
            self._preparing += 1
            self._send(process, Request(nbytes))

    def stage(self, step: int, folder: Path, state: dict[str, Tensor]) -> float:
        """Copy this rank's part of `state` and start writing it to `folder`; the stall in seconds.

        Waits first for an earlier save that is still being written, for `wait_s` at most; then this one is
        given up. How saves ended comes with `poll`.
        """
        began = time.monotonic()
        self._count += 1
        flight = _Flight(step, folder, self._count, began)
        if self.rank == 0:
            self._unfinished.append(flight)
        if not self._take_answer(self.wait_s):
            assert self._flight is not None
            error = f"skipped: step {self._flight.step} is still being written after {self.wait_s:.0f} s"
            self._give_up(flight, error)
            return time.monotonic() - began
        image = self._copy(own_pieces(state, self.rank))
        request = Request(
            image.nbytes,
            str(folder),
            f"__{self.rank}_0.distcp",
            self._report(flight, self.rank),
            image.digest,
            stage=str(self.stage_file) if self.stage_file is not None else None,
        )
        process = self._writer()
        if self._told != image.digest:
            request.layout, self._told = msgspec.Raw(image.encoded), image.digest
        self._flight = flight
        self._send(process, request)
        return time.monotonic() - began

    def poll(self) -> list[SaveResult]:
        """Saves that ended since the last call. On ranks other than 0 only failures of their own."""
        self._take_answer(0.0)
        self._expire()
        for flight in list(self._unfinished):
            self._finish(flight)
        results, self._ended = self._ended, []
        return results

    def wait(self) -> list[SaveResult]:
        """Block until nothing is in flight (on rank 0: on any rank). Bounded by the time limit."""
        results = self.poll()
        while self._flight is not None or self._unfinished:
            time.sleep(0.01)
            results += self.poll()
        return results

    def close(self) -> None:
        """End the writer once it has finished what it was given."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            if self._ended_within(self._process, 30.0) is None:
                self._process.kill()
                self._ended_within(self._process, KILL_S)
            self._process = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    # --- staging -----------------------------------------------------------------------------------
    def _copy(self, parts: list[tuple[Piece, Tensor]]) -> Image:
        pieces = [piece for piece, _ in parts]
        if self._image is None or not self._image.fits(pieces):
            image = Image(pieces, f"__{self.rank}_0.distcp")
            self._grow(image.room)
            if self._buffer is not None:
                image.frame(self._buffer)
            self._image = image
        for piece, (_, local) in zip(self._image.pieces, parts, strict=True):
            if piece.nbytes:
                assert self._buffer is not None
                view(self._buffer, piece).copy_(local, non_blocking=self._pinned)
        if self._pinned:
            torch.cuda.synchronize()
        return self._image

    def _grow(self, nbytes: int) -> None:
        """Kept for the life of the run: fresh pages cost far more than the copy itself."""
        room = -(-nbytes // PAGE) * PAGE
        if room == 0 or (self._buffer is not None and len(self._buffer) >= room):
            return
        if self._pinned:
            assert self._buffer is not None
            _cuda().cudaHostUnregister(_address(self._buffer))
        os.ftruncate(self._handle, room)
        self._buffer = map_buffer(self._handle, room)
        self._image = None
        if torch.cuda.is_available():
            self._pin(self._buffer)

    def _pin(self, buffer: mmap.mmap) -> None:
        """Let the GPU copy into the buffer by itself, at the speed of its bus."""
        code = int(_cuda().cudaHostRegister(_address(buffer), len(buffer), 1))
        self._pinned = code == 0
        if code:
            LOG.warning("the staging buffer cannot be pinned (CUDA error %d): saves stall longer", code)

    # --- the writer ----------------------------------------------------------------------------------
    def _writer(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._told, self._preparing = None, 0
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hpc_rl.checkpoint.writer", str(self._handle), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=(self._handle,),
            )
        return self._process

    def _send(self, process: subprocess.Popen[str], request: Request) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(request).decode() + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            LOG.error("the writer process of rank %d is gone", self.rank)  # `poll` says so of this save

    def _expire(self) -> None:
        """A writer that is past the time limit is killed; one that even so does not end is left behind."""
        if self._flight is None or self._process is None:
            return
        late = time.monotonic() - self._flight.began - self.timeout_s
        if late > KILL_S:
            LOG.critical("the writer process %d hangs in the kernel; a new one is started", self._process.pid)
            flight, self._flight, self._process, self._preparing = self._flight, None, None, 0
            self._give_up(flight, f"the writer of rank {self.rank} hangs in the kernel (a dead filesystem?)")
        elif late > 0:
            self._process.kill()

    def _ended_within(self, process: subprocess.Popen[str], limit_s: float) -> int | None:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def _take_answer(self, wait_s: float) -> bool:
        """Whether the writer is idle now; a failure is noted for `poll` and left for rank 0."""
        deadline = time.monotonic() + wait_s
        while self._preparing or self._flight is not None:
            answer = self._answer(max(0.0, deadline - time.monotonic()))
            if answer is None:
                return False
            if not answer.file and self._preparing:
                self._preparing -= 1
                continue
            if answer.note:
                LOG.warning("%s", answer.note)
            flight, self._flight = self._flight, None
            if flight is not None and answer.error:
                self._give_up(flight, answer.error)
        return True

    def _answer(self, wait_s: float) -> Answer | None:
        """None while the writer works; the death of the writer is an answer, too."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(wait_s):
                return None
        line = process.stdout.readline()
        if line:
            return msgspec.json.decode(line, type=Answer)
        code = self._ended_within(process, KILL_S)
        self._process, self._preparing = None, 0
        return Answer("-", error=f"the writer process of rank {self.rank} ended with code {code}")

    # --- the end of a save ---------------------------------------------------------------------------
    def _give_up(self, flight: _Flight, error: str) -> None:
        """Our own part failed: say so here, and leave it for rank 0."""
        if self.rank != 0:
            try:
                flight.folder.mkdir(exist_ok=True)  # not its parents: the controller may have cleared them
                report = Report(error=error)
                write_atomic(flight.folder / self._report(flight, self.rank), msgspec.json.encode(report))
            except OSError as lost:  # then rank 0's time limit is the end of it
                LOG.error("the failure could not be left for rank 0: %s", lost)
        self._end(flight, error)

    def _report(self, flight: _Flight, rank: int) -> str:
        return f".rank_{rank}.{self.token}.{flight.number}.json"

    def _finish(self, flight: _Flight) -> None:
        """On rank 0: `.metadata` from everyone's reports, once they are all there."""
        paths = [flight.folder / self._report(flight, rank) for rank in range(self.world_size)]
        try:
            if not all(path.is_file() for path in paths):
                if time.monotonic() - flight.began > self.timeout_s:
                    self._end(flight, self._missing(flight, paths))
                return
            reports = [msgspec.json.decode(path.read_bytes(), type=Report) for path in paths]
            errors = [f"rank {rank}: {r.error}" for rank, r in enumerate(reports) if r.error]
            if not errors:
                self._describe(flight.folder, reports)
                for path in flight.folder.glob(".rank_*.json"):  # those of an earlier start, too
                    path.unlink()
            self._end(flight, "; ".join(errors))
        except (OSError, ValueError) as error:
            self._end(flight, f"{type(error).__name__}: {error}")

    def _describe(self, folder: Path, reports: list[Report]) -> None:
        digests = [report.digest for report in reports]
        if self._metadata[0] != digests:  # the same from save to save
            pieces = [msgspec.json.decode(report.pieces, type=list[Piece]) for report in reports]
            self._metadata = (digests, *encode_pieces(pieces))
        _, pieces_data, data = self._metadata
        files = {r.file: FileEntry(r.nbytes, r.xxh3) for r in reports if r.nbytes}
        for name, content in ((PIECES, pieces_data), (".metadata", data)):
            files[name] = FileEntry(len(content), xxhash.xxh3_64_hexdigest(content))
        write_atomic(folder / WRITTEN, msgspec.json.encode(Written(self.world_size, files)))
        write_atomic(folder / PIECES, pieces_data)
        write_atomic(folder / ".metadata", data)

    def _end(self, flight: _Flight, error: str) -> None:
        if self.rank == 0:
            if flight not in self._unfinished:
                return
            self._unfinished.remove(flight)
        elif not error:
            return
        if error:
            LOG.error("checkpoint of step %d: %s", flight.step, error)
        self._ended.append(SaveResult(flight.step, time.monotonic() - flight.began, error))

    def _missing(self, flight: _Flight, paths: list[Path]) -> str:
        late = [rank for rank, path in enumerate(paths) if not path.is_file()]
        return f"after {self.timeout_s:.0f} s policy ranks {late} have not written step {flight.step}"


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _address(buffer: mmap.mmap) -> int:
    return torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
