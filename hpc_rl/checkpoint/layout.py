"""Checkpoint folders on disk: when one counts, which is the newest, which may go. No torch.

    checkpoints/step_00000100/{policy/, controller/, COMPLETE}

A folder counts when it holds `COMPLETE`, which appears by an atomic rename after everything below has
been synced. A folder without it is partial: still being written, or what a crash left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

COMPLETE = "COMPLETE"
_STEP = re.compile(r"^step_(\d{8,})$")
_GOING = ".deleting-"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder by its name; None for other folders."""
    match = _STEP.match(folder.name)
    return int(match.group(1)) if match else None


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable (a rename is only in memory until then)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str) -> None:
    """Write `path` so that it is there whole and durable, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_complete(folder: Path) -> None:
    """Declare the checkpoint in `folder` complete. Syncs all its files and folders first.

    Raises ValueError if the policy's part is not there.
    """
    policy = folder / "policy"
    if not (policy / ".metadata").is_file():
        raise ValueError(f"{folder} has no finished policy part (policy/.metadata); it cannot be complete")
    for parent, _, files in os.walk(folder):
        for name in files:
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(parent))
    write_atomic(folder / COMPLETE, json.dumps({"step": step_of(folder), "time": time.time()}) + "\n")
    sync_folder(folder.parent)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    return [folder for folder in _folders(checkpoints) if (folder / COMPLETE).is_file()]


def latest_complete(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint folder, or None."""
    complete = complete_checkpoints(checkpoints)
    return complete[-1] if complete else None


def partial_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders without COMPLETE: being written, or left behind by a crash. Oldest first."""
    return [folder for folder in _folders(checkpoints) if not (folder / COMPLETE).is_file()]


def retain(checkpoints: Path, max_keep: int) -> list[Path]:
    """Remove superseded checkpoints; the removed folders.

    The newest `max_keep` complete ones stay (-1: all; the newest one stays whatever `max_keep` is), and
    with them everything newer than the newest complete one, which may be in writing. Partial folders older
    than that are removed: a complete checkpoint has superseded them.
    """
    complete = complete_checkpoints(checkpoints)
    if not complete:
        return []
    gone = [] if max_keep < 0 else complete[: -max(1, max_keep)]
    newest = step_of(complete[-1]) or 0
    gone += [folder for folder in partial_checkpoints(checkpoints) if (step_of(folder) or 0) < newest]
    for folder in gone:
        # Renamed first: a crash in the middle of the removal must not leave half a complete checkpoint.
        going = folder.with_name(_GOING + folder.name)
        os.replace(folder, going)
        shutil.rmtree(going)
    for rest in checkpoints.glob(f"{_GOING}*"):  # of a crash in the middle of an earlier removal
        shutil.rmtree(rest)
    return gone


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    found = [entry for entry in checkpoints.iterdir() if step_of(entry) is not None and entry.is_dir()]
    return sorted(found, key=lambda folder: step_of(folder) or 0)
