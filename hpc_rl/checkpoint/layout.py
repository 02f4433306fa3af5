"""Checkpoint folders on disk: when one counts, which is the newest, which may go. No torch.

    checkpoints/step_00000100/{policy/, controller/, COMPLETE}

A folder counts when it holds `COMPLETE`, which appears by an atomic rename after everything below has
been synced, and no `BAD`. A folder without COMPLETE is partial: being written, or left by a crash.
Nothing is removed unless a newer complete checkpoint has superseded it; the exceptions are said at
`clear_failed` and `clear_dead`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from hpc_rl.checkpoint.manifest import BAD, COMPLETE, mark_bad, verify
from hpc_rl.checkpoint.manifest import sync_folder as sync_folder
from hpc_rl.checkpoint.manifest import write_atomic as write_atomic
from hpc_rl.checkpoint.manifest import write_complete as _write_complete

_STEP = re.compile(r"^step_(\d{8,})$")
_ASIDE = re.compile(r"^\.aside-step_(\d{8,})-\d+$")
_GOING = ".deleting-"


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder by its name; None for other folders."""
    match = _STEP.match(folder.name)
    return int(match.group(1)) if match else None


def write_complete(folder: Path) -> None:
    """Declare the checkpoint in `folder` complete. Raises ValueError if it is not (`manifest`)."""
    _write_complete(folder, step_of(folder))


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoint folders that nobody found bad, oldest first."""
    return [folder for folder in _folders(checkpoints) if _complete(folder)]


def latest_complete(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint folder, or None."""
    complete = complete_checkpoints(checkpoints)
    return complete[-1] if complete else None


def partial_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders without COMPLETE: being written, or left behind by a crash. Oldest first."""
    return [folder for folder in _folders(checkpoints) if not (folder / COMPLETE).is_file()]


@dataclass
class Choice:
    """The newest good checkpoint, and the newer ones that are not, with the reason."""

    folder: Path | None = None
    bad: list[tuple[Path, str]] = field(default_factory=list)


def choose(checkpoints: Path, *, checksums: bool = False) -> Choice:
    """The newest complete checkpoint that verifies. Changes nothing on disk (see `reject`)."""
    choice = Choice()
    for folder in reversed(complete_checkpoints(checkpoints)):
        reason = verify(folder, checksums=checksums)
        if not reason:
            choice.folder = folder
            break
        choice.bad.append((folder, reason))
    return choice


def reject(folder: Path, reason: str) -> None:
    """Leave a bad checkpoint where it is, marked so that nobody chooses it again.

    What was trained after it is rolled back from now on: an attempt that continues from it after another
    one continued from an older one would train steps twice.
    """
    mark_bad(folder, reason)


# --- making room -----------------------------------------------------------------------------------------
def claim(folder: Path) -> None:
    """Make way for a new save at `folder`, by rename: a writer of an earlier attempt that is still at it
    writes into the old folder. What is partial goes with the next `sweep`; what is complete (it was found
    bad) is moved aside, and goes when the new one is complete."""
    if not folder.exists():
        return
    if not (folder / COMPLETE).exists():
        take(folder)
        return
    number = 1
    while (aside := folder.with_name(f".aside-{folder.name}-{number}")).exists():
        number += 1
    os.replace(folder, aside)
    sync_folder(folder.parent)


def superseded(
    checkpoints: Path,
    max_keep: int,
    *,
    protected: Collection[int] = (),
    writing: Collection[int] = (),
) -> list[Path]:
    """The folders that may go.

    The newest `max_keep` complete ones stay (-1: all; the newest one stays whatever `max_keep` is), and
    the `protected` steps. Partial, bad and aside-moved ones go when a complete one of the same or a later
    step is there, unless they are `writing`. Folders with other names are not ours.
    """
    complete = complete_checkpoints(checkpoints)
    if not complete:
        return []
    newest = step_of(complete[-1]) or 0
    old = [] if max_keep < 0 else complete[: -max(1, max_keep)]
    gone = [folder for folder in old if step_of(folder) not in protected]
    gone += [
        folder
        for folder in _folders(checkpoints)
        if not _complete(folder) and (step_of(folder) or 0) < newest and step_of(folder) not in writing
    ]
    return gone + [folder for step, folder in _asides(checkpoints) if step <= newest]


def supersede(
    checkpoints: Path,
    max_keep: int,
    *,
    protected: Collection[int] = (),
    writing: Collection[int] = (),
) -> list[Path]:
    """Take what is `superseded` out of the way (by rename, at once); the former paths."""
    gone = superseded(checkpoints, max_keep, protected=protected, writing=writing)
    for folder in gone:
        take(folder)
    return gone


def sweep(checkpoints: Path) -> None:
    """Remove what was taken out of the way, by this process or by one that was killed while at it."""
    for rest in checkpoints.glob(f"{_GOING}*"):
        shutil.rmtree(rest, ignore_errors=True)  # another sweep may be at it; the next one finds the rest


def retain(
    checkpoints: Path, max_keep: int, *, protected: Collection[int] = (), writing: Collection[int] = ()
) -> list[Path]:
    """`supersede` and `sweep`; the removed folders."""
    gone = supersede(checkpoints, max_keep, protected=protected, writing=writing)
    sweep(checkpoints)
    return gone


def clear_failed(folder: Path) -> None:
    """Remove what is left of a save of this attempt that has failed: it may be what fills the disk."""
    if folder.exists() and not (folder / COMPLETE).exists():
        take(folder)


def clear_dead(checkpoints: Path, writing: Collection[int]) -> list[Path]:
    """Remove partial folders that no process can finish any more, where there is no room for a new save.

    The caller holds the run: what is not in `writing` belongs to an earlier attempt. Without COMPLETE it can
    never be restored, and it may be just what keeps every later save from having room.
    """
    dead = [folder for folder in partial_checkpoints(checkpoints) if step_of(folder) not in writing]
    for folder in dead:
        take(folder)
    return dead


def take(folder: Path) -> None:
    """Take a folder out of the way, for `sweep`: a crash in the middle of the removal must not leave half a
    complete checkpoint under its name."""
    number = 0
    while (going := folder.with_name(f"{_GOING}{number}-{folder.name}")).exists():
        number += 1
    os.replace(folder, going)


def _complete(folder: Path) -> bool:
    return (folder / COMPLETE).is_file() and not (folder / BAD).exists()


def _folders(checkpoints: Path) -> list[Path]:
    if not checkpoints.is_dir():
        return []
    found = [entry for entry in checkpoints.iterdir() if step_of(entry) is not None and entry.is_dir()]
    return sorted(found, key=lambda folder: step_of(folder) or 0)


def _asides(checkpoints: Path) -> list[tuple[int, Path]]:
    found = [(_ASIDE.match(entry.name), entry) for entry in checkpoints.iterdir()]
    return [(int(match.group(1)), entry) for match, entry in found if match]
