"""A trainer of a few megabytes around the real `Saves`, `Saver`, writer process and restore.

After each acknowledged checkpoint (`Saves.saved` returned with it complete) its step goes into RUN/acks.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from hpc_rl.bus.messages import CheckpointSaved, Message, SaveCheckpoint
from hpc_rl.checkpoint.loader import load_into
from hpc_rl.checkpoint.saver import Saver
from hpc_rl.controller.saves import Saves
from hpc_rl.controller.uploads import Uploads
from hpc_rl.policy.restore import Restorer
from hpc_rl.recipe.schema import Checkpoint
from hpc_rl.run.events import EventLog
from hpc_rl.run.paths import RunDir

LOG = logging.getLogger("test")
MEBI = 1 << 20


def fill(state: dict[str, Tensor], step: int) -> None:
    """What training would have made of the state after `step` steps."""
    for number, tensor in enumerate(state.values()):
        tensor.fill_(float(step % 1000 + number * 1000))
    state["step"].fill_(step)


def empty_state() -> dict[str, Tensor]:
    large = {f"model.{n}": torch.zeros(2 * MEBI) for n in range(2)}
    return {**large, "model.small": torch.zeros(1000, dtype=torch.bfloat16), "step": torch.zeros(())}


def restore(folder: Path, state: dict[str, Tensor]) -> int:
    """Load `state` and see that it is what was saved."""
    load_into(folder, state)
    step = int(state["step"])
    expected = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    fill(expected, step)
    assert all(torch.equal(state[name], expected[name]) for name in state), (
        f"step {step} is not what was saved"
    )
    return step


class SmallTrainer:
    """Saves every step, keeps two checkpoints."""

    def __init__(self, run: RunDir, attempt: int) -> None:
        self.run, self.state = run, empty_state()
        self.events = EventLog(run, attempt)
        self.commands: list[Message] = []
        self.saver = Saver(0, 1, f"{attempt}.1")
        options = Checkpoint(save_every=1, max_keep=2, export="off", keep_best=False)
        self.saves = Saves(
            run,
            options,
            command=self.commands.append,
            write_state=lambda folder, step: (folder / "state.json").write_text(str(step)),
            tell=self.events.append,
            uploads=Uploads(run, options, attempt, self.events.append),
        )
        restorer = Restorer(
            run, attempt, 0, torch.device("cpu"), lambda folder: restore(folder, self.state), LOG
        )
        self.step = restorer.newest()
        self.saves.restored(self.step)
        self.saver.prepare()

    def advance(self) -> None:
        """One step and, unless one is being written, its save."""
        self.step += 1
        fill(self.state, self.step)
        if not self.saves.busy:
            self.saves.save(self.step)
        for command in self.commands:
            assert isinstance(command, SaveCheckpoint)
            self.saver.stage(command.step, self.run.checkpoint(command.step) / "policy", self.state)
        self.commands.clear()
        self.take()

    def take(self) -> None:
        for result in self.saver.poll():
            self.saves.saved(CheckpointSaved(result.step, result.seconds, result.error))
            if self.saves.last_complete == result.step:
                with (self.run.root / "acks").open("a") as acks:
                    acks.write(f"{result.step}\n")

    def finish(self) -> None:
        """Until nothing is being written."""
        while self.saves.busy:
            self.take()
            time.sleep(0.001)


def train(root: str, attempt: int) -> None:
    """Train until killed."""
    os.setsid()  # the test kills trainer and writer together, or the trainer alone
    torch.set_num_threads(1)
    trainer = SmallTrainer(RunDir(Path(root)), attempt)
    (trainer.run.root / f"started_{attempt}").touch()
    while True:
        trainer.advance()
        time.sleep(0.002)
