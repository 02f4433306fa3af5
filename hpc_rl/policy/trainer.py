"""The trainer protocol: what the policy's command loop needs of whatever does the training.

Trainers are registered by name (`policy.trainer`); a plugin's may replace all computing, as the paced
benchmark's does, and still be driven by the real controller, bus and loop.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hpc_rl.bus.messages import CheckpointSaved, ModelExported, TrainStep
from hpc_rl.plan.schema import Plan
from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir


class BadStepError(RuntimeError):
    """A step that must not change the weights; the message names its samples and the newest checkpoint."""


class NonFiniteError(BadStepError):
    """The loss or its gradient is NaN or infinite."""


class SpikeError(BadStepError):
    """The loss stayed far above that of the steps before (`policy.guard`)."""


@dataclass(frozen=True)
class TrainerContext:
    """What a trainer is made from. `bus_file` is None outside a run (then one process only)."""

    recipe: Recipe
    plan: Plan
    run_dir: RunDir
    rank: int
    world_size: int
    attempt: int
    incarnation: int
    bus_file: Path | None
    log: logging.Logger


class Trainer(Protocol):
    """One per policy rank; all ranks call the same methods in the same order."""

    total_steps: int

    def load(self) -> int:
        """Build or restore everything; the number of steps done before."""
        ...

    def info(self) -> dict[str, str]:
        """What `PolicyReady` says of it (`total_steps`, `parameters`, `eval_rows`, ...)."""
        ...

    def train_step(self, command: TrainStep) -> dict[str, float]:
        """Run one optimizer step; metrics by slash name, equal on all ranks.

        Raises BadStepError before any weight is changed."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """The validation loss after `step` (`eval/loss`, ...), equal on all ranks. Changes nothing of the
        training. Only commanded where `info` has `eval_rows` above 0."""
        ...

    def source(self) -> Any:
        """The current weights (a `weights.WeightSource`)."""
        ...

    def stage_checkpoint(self, step: int, folder: Path, sync: bool) -> float:
        """Copy the state after `step`, write it to `folder` in the background; the stall in seconds."""
        ...

    def export(self, step: int, label: str, folder: Path) -> None:
        """Write safetensors of the current weights to `folder` (rank 0 in the background)."""
        ...

    def poll(self) -> Iterator[CheckpointSaved | ModelExported]:
        """Background writes that ended since the last call (rank 0)."""
        ...

    def finish(self) -> Iterator[CheckpointSaved | ModelExported]:
        """Wait, within limits, for the background writes and yield how they ended."""
        ...

    def close(self) -> None:
        """Leave the process groups and end helper processes."""
        ...


def make_trainer(context: TrainerContext) -> Trainer:
    """The trainer that the recipe names. Raises UnknownExtension."""
    trainer: Trainer = registry("trainers").load(context.recipe.policy.trainer)(context)
    return trainer
