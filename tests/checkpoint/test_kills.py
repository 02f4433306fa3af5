"""kill -9 during saves: a later start always finds a complete checkpoint, and none acknowledged is lost."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from hpc_rl.checkpoint.layout import choose, partial_checkpoints, step_of, sweep
from hpc_rl.run.paths import RunDir
from tests.checkpoint.small_trainer import SmallTrainer, empty_state, restore, train

pytestmark = [pytest.mark.torch, pytest.mark.slow]
KILLS = 50
START_LIMIT_S = 60.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.checkpoint.small_trainer"])


def wait_for(process: BaseProcess, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not happened():
        assert process.is_alive(), f"the trainer did not find what it needs (exit code {process.exitcode})"
        assert time.monotonic() < deadline, "the trainer does not get on"
        time.sleep(0.002)


def kill_at_a_random_moment(run: RunDir, attempt: int, dice: random.Random) -> None:
    """Start a trainer, and kill it within the first few saves: alone, or together with its writer."""
    process = _CONTEXT.Process(target=train, args=(str(run.root), attempt))
    process.start()
    assert process.pid is not None
    try:
        wait_for(process, lambda: (run.root / f"started_{attempt}").exists())
        if dice.random() < 0.5:  # else the first save is hit
            count = len(acknowledged(run))
            wait_for(process, lambda: len(acknowledged(run)) > count)
        time.sleep(dice.uniform(0.0, 0.25))
        assert process.is_alive(), f"the trainer ended by itself with {process.exitcode}"
    finally:
        if not process.is_alive():
            pass
        elif dice.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)  # as a lost node
        else:
            os.kill(process.pid, signal.SIGKILL)  # the writer is left behind in the middle of a file
        process.join()


def acknowledged(run: RunDir) -> list[int]:
    if not (run.root / "acks").exists():
        return []
    return [int(line) for line in (run.root / "acks").read_text().split()]


def test_fifty_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "killed")
    dice = random.Random(20)
    partial = 0
    for attempt in range(1, KILLS + 1):
        kill_at_a_random_moment(run, attempt, dice)
        acks, choice = acknowledged(run), choose(run.checkpoints, checksums=True)
        assert choice.bad == [], f"attempt {attempt} left damaged checkpoints that count as complete"
        if acks:
            assert choice.folder is not None, (
                f"attempt {attempt}: step {acks[-1]} was acknowledged and is gone"
            )
            step = step_of(choice.folder)
            assert step is not None
            assert step >= acks[-1], f"attempt {attempt}: step {acks[-1]} was acknowledged, {step} is there"
            assert restore(choice.folder / "policy", empty_state()) == step
            assert (choice.folder / "controller" / "state.json").read_text() == str(step)
        partial += bool(partial_checkpoints(run.checkpoints))
    # The kills must have hit saves, and saves must have come through: else this test shows nothing.
    assert partial >= KILLS // 5, f"only {partial} of {KILLS} kills hit a save"
    assert len(acknowledged(run)) >= KILLS // 3
    clears_up(run)


def clears_up(run: RunDir) -> None:
    """What the kills left goes as soon as something newer is complete."""
    newest = max(step_of(path) or 0 for path in run.checkpoints.iterdir())
    trainer = SmallTrainer(run, KILLS + 1)
    while trainer.saves.last_complete <= newest:
        trainer.advance()
    trainer.finish()
    trainer.saver.close()
    sweep(run.checkpoints)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        run.checkpoint(step).name for step in run.complete_steps()
    ]
    assert len(run.complete_steps()) == 2
