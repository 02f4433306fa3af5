"""A training run on a disk that fills up, becomes read-only and loses a folder.

Run by test_bad_disk.py in a mount namespace of its own: `python -m tests.checkpoint.bad_disk FOLDER`, where
FOLDER is a tmpfs of 96 MiB. One checkpoint takes 16 MiB; two are kept.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from hpc_rl.checkpoint.layout import latest_complete, step_of
from hpc_rl.checkpoint.manifest import verify
from hpc_rl.cli._state import checkpoint_problem
from hpc_rl.run.events import read_events
from hpc_rl.run.paths import RunDir
from tests.checkpoint.small_trainer import MEBI, SmallTrainer, empty_state, restore


def save_now(trainer: SmallTrainer) -> bool:
    """Train a few steps, of which one is saved at least; whether the last save went well."""
    for _ in range(3):
        trainer.advance()
        trainer.finish()
        time.sleep(0.01)
    return trainer.saves.failures == 0


def newest_is(run: RunDir, step: int) -> None:
    folder = latest_complete(run.checkpoints)
    assert folder is not None
    assert step_of(folder) == step, f"{folder} instead of step {step}"
    assert verify(folder, checksums=True) == ""
    assert restore(folder / "policy", empty_state()) == step


def fill_disk(folder: Path, leave: int) -> Path:
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize) > leave:
            file.write(bytes(min(MEBI, free - leave)))
            file.flush()
    return ballast


def problem(run: RunDir) -> str:
    return checkpoint_problem(read_events(run), 1) or ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    run = RunDir.create(folder, "full")
    trainer = SmallTrainer(run, 1)
    assert save_now(trainer)
    good = trainer.saves.last_complete
    newest_is(run, good)

    for leave in (20 * MEBI, 0):  # no room for a checkpoint; no room for a byte
        ballast = fill_disk(folder, leave)
        before = trainer.step
        assert not save_now(trainer), "a save cannot have gone well"
        assert trainer.step == before + 3, "training did not go on"
        newest_is(run, good)
        if leave:
            assert "No space left on device" in problem(run), problem(run)
            assert "FAILED (3 in a row)" in problem(run), problem(run)
        ballast.unlink()
        assert save_now(trainer), "there is room again, and the save fails"
        good = trainer.saves.last_complete
        newest_is(run, good)
        assert problem(run) == "", problem(run)
    failed = [e for e in read_events(run) if e["kind"] == "checkpoint_failed"]
    assert len(failed) == 6, "events of the time without room are lost"

    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    assert not save_now(trainer)
    newest_is(run, good)
    subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    assert save_now(trainer)
    assert "Read-only file system" in str([e for e in read_events(run) if e["kind"] == "checkpoint_failed"])

    shutil.rmtree(run.checkpoints)  # by somebody who wanted to make room
    assert save_now(trainer)
    newest_is(run, trainer.saves.last_complete)
    trainer.saver.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
