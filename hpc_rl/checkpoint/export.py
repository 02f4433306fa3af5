"""Safetensors that `from_pretrained` and vLLM load as they are: written in place, at most 4 GB each, atomic.

Each rank writes its own bytes directly into the final files (`export_parts.py` says which). What holds up
the training is one copy of them into a host buffer that is kept; a thread writes from there: `pwrite` and
`fsync` let go of the interpreter. Nothing in the background communicates: each rank leaves a report beside
the files, and rank 0 adds config and tokenizer when all are there, and renames the folder.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from hpc_rl.checkpoint.export_folder import describe, publish, write_header
from hpc_rl.checkpoint.export_parts import ExportError, Layout, Part, Source, Units, lay_out, parts, signature
from hpc_rl.checkpoint.layout import write_atomic

__all__ = ["Export", "ExportError", "Exporter", "Source", "write_now"]

LOG = logging.getLogger("hpc_rl.checkpoint")
FILE_BYTES = 4_000_000_000
ALIGN = 64
POLL_S = 0.005
CLOSE_S = 1.0


class Report(msgspec.Struct):
    """What one rank wrote, or why it could not: read by rank 0."""

    nbytes: int = 0
    error: str = ""


@dataclass(frozen=True)
class _Slot:
    """`nbytes` of the buffer, from `at`, belong to `start` of file number `file`."""

    at: int
    nbytes: int
    file: int
    start: int


class Export:
    """One export under way, or done. `model` is the folder of the model that was trained (config and
    tokenizer are copied from it), `tokenizer` another folder for the tokenizer, or None. `also` writes
    what else belongs into the folder it is given (an adapter), before that is published."""

    def __init__(
        self,
        target: Path,
        model: Path,
        tokenizer: Path | None,
        dtype: torch.dtype,
        also: Callable[[Path], None] | None = None,
    ) -> None:
        self.target, self.model, self.tokenizer, self.dtype = target, model, tokenizer, dtype
        self.also = also
        self.error: str | None = None
        self.seconds = 0.0
        self._began = time.monotonic()
        self._ended = threading.Event()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def join(self, timeout_s: float) -> Path:
        """Wait for the files; the finished folder. Raises ExportError."""
        if not self._ended.wait(timeout_s):
            raise ExportError(f"{self.target} was not written within {timeout_s:.0f} s")
        if self.error is not None:
            raise ExportError(self.error)
        return self.target

    def end(self, error: str | None = None) -> None:
        self.error, self.seconds = error, time.monotonic() - self._began
        self._ended.set()


@dataclass(frozen=True)
class _Job:
    export: Export
    layout: Layout
    slots: list[_Slot]
    folder: Path


class Exporter:
    """One per rank. `token` tells the folders of this start apart from those of an earlier one.

    One export per rank is staged at a time: the next one waits until the buffer has been written.
    """

    def __init__(self, rank: int, world_size: int, token: str, timeout_s: float = 1800.0) -> None:
        self.rank, self.world_size, self.token, self.timeout_s = rank, world_size, token, timeout_s
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._count = 0
        self._layout: tuple[tuple[object, ...], Layout] | None = None
        self._jobs: queue.Queue[_Job | None] = queue.Queue()
        self._written = threading.Event()  # the buffer is free
        self._written.set()
        self._thread: threading.Thread | None = None

    def stage(self, source: Source, export: Export) -> Export:
        """Copy this rank's part of `source` and start writing it; training may go on afterwards.

        All ranks call it in the same order. Raises ExportError when the one before is not written in time.
        """
        if not self._written.wait(self.timeout_s):
            raise ExportError(f"rank {self.rank} has not written the export before {export.target} yet")
        units = source.units()
        layout = self._layout_of(source, units)
        slots = self._copy(source, units, layout)
        self._written.clear()
        # The same on all ranks and never used twice: nobody has to wait for a fresh folder.
        self._count += 1
        folder = export.target.with_name(f".{export.target.name}.{self.token}.{self._count}.partial")
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="export", daemon=True)
            self._thread.start()
        self._jobs.put(_Job(export, layout, slots, folder))
        return export

    def close(self) -> None:
        """End the thread. An export that is to be finished is waited for before (`Export.join`): a process
        that was told to end has no time for it."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_S)
            self._thread = None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    # --- staging -----------------------------------------------------------------------------------
    def _layout_of(self, source: Source, units: Units) -> Layout:
        key = signature(units)
        if self._layout is None or self._layout[0] != key:
            self._layout = (key, lay_out(source, units, self.rank, self.world_size, FILE_BYTES))
        return self._layout[1]

    def _copy(self, source: Source, units: Units, layout: Layout) -> list[_Slot]:
        needed = layout.nbytes + ALIGN * layout.count
        slots = []
        at, on_device = 0, False
        for part in parts(source, units, layout, self.rank):
            if self._buffer.numel() < needed:  # kept: fresh pages cost far more than the copy
                self._buffer = torch.empty(needed, dtype=torch.uint8, pin_memory=part.tensor.is_cuda)
            slot = _Slot(at, part.tensor.numel() * part.dtype.itemsize, part.file, part.start)
            room = self._buffer[at : at + slot.nbytes].view(part.dtype).view(part.tensor.shape)
            room.copy_(part.tensor, non_blocking=True)
            on_device |= part.tensor.is_cuda
            slots.append(slot)
            at += -(-slot.nbytes // ALIGN) * ALIGN
        if on_device:
            torch.cuda.synchronize()
        return slots

    # --- in the background ---------------------------------------------------------------------------
    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            report = self._write(job)
            self._written.set()
            if self.rank != 0:
                job.export.end(report.error or None)
                continue
            try:
                if report.error and not (job.folder / self._report(0)).is_file():
                    raise ExportError(f"rank 0: {report.error}")
                self._finish(job)
                job.export.end()
            except Exception as error:  # noqa: BLE001 -- reported, and the run goes on
                shutil.rmtree(job.folder, ignore_errors=True)
                words = str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"
                job.export.end(words)

    def _write(self, job: _Job) -> Report:
        report = Report()
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                for file in job.layout.plan.files:
                    write_header(job.folder, file)
            memory = self._buffer.numpy().data
            blocks = ((s.file, s.start, memory[s.at : s.at + s.nbytes]) for s in job.slots)
            report.nbytes = _write_blocks(job.folder, job.layout, blocks)
        except Exception as error:  # noqa: BLE001 -- rank 0 tells
            report.error = f"{type(error).__name__}: {error}"
        try:
            write_atomic(job.folder / self._report(self.rank), msgspec.json.encode(report).decode())
        except OSError as error:
            LOG.error("export: rank %d could not say how it went (%s): %s", self.rank, report, error)
            report.error = report.error or f"{type(error).__name__}: {error}"
        return report

    def _report(self, rank: int) -> str:
        return f".rank_{rank}.json"

    def _finish(self, job: _Job) -> None:
        """On rank 0: wait for the others (who would make a folder anew that is removed too early), check
        that every byte was written, publish."""
        reports = [job.folder / self._report(rank) for rank in range(self.world_size)]
        deadline = time.monotonic() + self.timeout_s
        while not all(report.is_file() for report in reports):
            late = [rank for rank, report in enumerate(reports) if not report.is_file()]
            if time.monotonic() > deadline:
                raise ExportError(
                    f"policy ranks {late} have not written their part of {job.export.target} "
                    f"within {self.timeout_s:.0f} s"
                )
            time.sleep(POLL_S)
        found = [msgspec.json.decode(report.read_bytes(), type=Report) for report in reports]
        errors = [f"rank {rank}: {report.error}" for rank, report in enumerate(found) if report.error]
        if errors:
            raise ExportError("; ".join(errors))
        _check_filled(job.layout, sum(report.nbytes for report in found))
        for report in reports:
            report.unlink()
        export = job.export
        describe(job.folder, job.layout.plan, export.model, export.tokenizer, export.dtype)
        if export.also is not None:
            export.also(job.folder)
        publish(job.folder, export.target)


def write_now(source: Source, export: Export, folder: Path) -> Path:
    """Write all of `source` from this one process, a layer at a time, to `folder` and then `export.target`.

    No more than a layer is in memory. Raises ExportError.
    """
    units = source.units()
    layout = lay_out(source, units, 0, 1, FILE_BYTES)
    try:
        folder.mkdir(parents=True)
        for file in layout.plan.files:
            write_header(folder, file)
        blocks = ((part.file, part.start, _bytes_of(part)) for part in parts(source, units, layout, 0))
        _check_filled(layout, _write_blocks(folder, layout, blocks))
        describe(folder, layout.plan, export.model, export.tokenizer, export.dtype)
        if export.also is not None:
            export.also(folder)
        publish(folder, export.target)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ExportError(f"{type(error).__name__}: {error}") from error
    return export.target


def _bytes_of(part: Part) -> memoryview:
    flat = part.tensor.to("cpu", part.dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _write_blocks(folder: Path, layout: Layout, blocks: Iterable[tuple[int, int, memoryview]]) -> int:
    """Write `(file number, start, bytes)` in place and sync the files; the number of bytes."""
    handles: dict[int, int] = {}
    nbytes = 0
    try:
        for file, start, data in blocks:
            if file not in handles:
                path = folder / layout.plan.files[file].name
                handles[file] = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            nbytes += len(data)
            while data:  # one call writes 2 GiB at most
                written = os.pwrite(handles[file], data, start)
                data, start = data[written:], start + written
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            os.close(handle)
    return nbytes


def _check_filled(layout: Layout, nbytes: int) -> None:
    planned = layout.plan.nbytes - sum(len(file.header) for file in layout.plan.files)
    if nbytes != planned:
        raise ExportError(f"{nbytes} bytes of tensors were written, {planned} were planned")
