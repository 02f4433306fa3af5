"""Sets up the recorder of an attempt: rolled-back metrics, W&B, Slurm's job comment."""

from __future__ import annotations

import logging
import os

from hpc_rl.cluster.slurm.watcher import set_comment
from hpc_rl.controller.recorder import Recorder
from hpc_rl.roles import RoleProcess
from hpc_rl.run.ledger import PromptLedger
from hpc_rl.telemetry.wandb import WandbWriter

LOG = logging.getLogger("hpc_rl.controller")


def make_recorder(role: RoleProcess, total_steps: int, *, restored: int) -> Recorder:
    """The recorder of this attempt, after moving aside what a restore at step `restored` undid."""
    options = role.recipe.logging.wandb
    writer = None
    if options.mode != "off":
        writer = WandbWriter(
            options.mode,
            folder=role.run_dir.wandb,
            project=options.project,
            entity=options.entity,
            name=f"{role.run_dir.name}/{role.run_dir.run_id}",
            config=role.recipe.model_dump(mode="json"),
        )
    job = os.environ.get("SLURM_JOB_ID")
    comment = (lambda text: set_comment(job, text)) if job else None
    recorder = Recorder(role.run_dir.metrics, role.attempt, total_steps, writer, comment)
    gone = recorder.log.roll_back(restored)
    lost = PromptLedger(role.run_dir, role.attempt).roll_back(restored)
    if gone or lost:
        LOG.info(
            "continuing after step %d: %d metric rows and %d ledger entries rolled back", restored, gone, lost
        )
    return recorder
