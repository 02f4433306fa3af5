"""The weights that an evaluation alone takes from a checkpoint: exported once by the job itself, for all."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir

LOG = logging.getLogger("hpc_rl.checkpoint")
POLL_S = 1.0


def use_checkpoint(recipe: Recipe, run: RunDir, index: int, limit_s: float) -> None:
    """Make `recipe.model` that of `eval.checkpoint`: process 0 of the group exports it into the run, the
    others wait for it.

    Raises ExportError or CheckpointError, and TimeoutError after `limit_s`.
    """
    if recipe.eval.checkpoint is None:
        return
    checkpoint = Path(recipe.eval.checkpoint)
    folder = run.safetensors / checkpoint.name
    if index == 0 and not folder.exists():
        from hpc_rl.checkpoint.offline import export_checkpoint  # torch: seconds

        source, step = RunDir(checkpoint.parent.parent), int(checkpoint.name.removeprefix("step_"))
        LOG.info("exporting %s for the evaluation", checkpoint)
        export_checkpoint(source, step, folder, merged=True)
    deadline = time.monotonic() + limit_s
    while not folder.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{folder} was not there {limit_s:.0f} s after the start: process 0 exports it"
            )
        time.sleep(POLL_S)
    model = recipe.model
    model.path, model.revision, model.tokenizer = str(folder), None, None
    model.lora = model.stage = None
