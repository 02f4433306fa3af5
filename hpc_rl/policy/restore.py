"""The start of the policy: from the newest checkpoint that is good, on all ranks the same one.

Rank 0 chooses (sizes of all files against `COMPLETE`) and tells the others. A checkpoint that does not
load is compared byte for byte; if it is damaged it is marked `BAD`, left where it is, and the next
older one is taken. A checkpoint that is sound but does not fit the recipe is an error, never passed over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from hpc_rl.checkpoint.layout import choose, reject
from hpc_rl.checkpoint.loader import CheckpointError
from hpc_rl.checkpoint.manifest import BAD, verify
from hpc_rl.policy.trainer import TrainerContext
from hpc_rl.run.events import EventLog
from hpc_rl.run.paths import RunDir

NONE, NO_GOOD = -1, -2


class Restorer:
    """`restore(folder)` fills this rank's state from a `policy/` folder and returns the step."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        rank: int,
        device: torch.device,
        restore: Callable[[Path], int],
        log: logging.Logger,
    ) -> None:
        self.run, self.rank, self.device, self.restore, self.log = run, rank, device, restore, log
        self.events = EventLog(run, attempt)

    def newest(self) -> int:
        """Restore the newest good checkpoint; its step, 0 if the run has none yet.

        Raises CheckpointError if there are checkpoints but no good one, or if a good one does not fit.
        """
        while True:
            step = self._agree(self._choose() if self.rank == 0 else 0)
            if step == NONE:
                return 0
            if step == NO_GOOD:
                raise CheckpointError(
                    f"no checkpoint in {self.run.checkpoints} is whole (see BAD in each for the reason); to "
                    "start anew, remove that folder; to try one of them all the same, remove its BAD"
                )
            folder = self.run.checkpoint(step)
            error: CheckpointError | None = None
            try:
                done = self.restore(folder / "policy")
            except CheckpointError as failed:
                error = failed
                self.log.error("step %d could not be restored: %s", step, failed)
            if self._agree(0 if error is None else 1, dist.ReduceOp.MAX) == 0:
                return done
            damaged = self._agree(int(self._is_damaged(folder)) if self.rank == 0 else 0)
            if not damaged:
                raise error or CheckpointError(
                    f"another policy rank could not restore {folder} (see its log)"
                )

    def _choose(self) -> int:
        """The newest checkpoint whose files have their sizes, on rank 0; the others are marked."""
        choice = choose(self.run.checkpoints)
        for folder, reason in choice.bad:
            self._reject(folder, reason)
        if choice.folder is not None:
            return int(choice.folder.name.removeprefix("step_"))
        return NO_GOOD if any(self.run.checkpoints.glob(f"step_*/{BAD}")) else NONE

    def _is_damaged(self, folder: Path) -> bool:
        reason = verify(folder, checksums=True)
        if reason:
            self._reject(folder, reason)
        return bool(reason)

    def _reject(self, folder: Path, reason: str) -> None:
        self.log.warning(
            "checkpoint %s is damaged: %s; it stays there and is not used, the run goes on from an older one",
            folder,
            reason,
        )
        reject(folder, reason)
        self.events.append("checkpoint_bad", checkpoint=folder.name, reason=reason)

    def _agree(self, value: int, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> int:
        """The sum (by default what rank 0 gave, if the others gave 0) over all ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return int(tensor.item())


def stage_file(context: TrainerContext) -> Path | None:
    """Where this rank's part is written first, on the node's own disk (`checkpoint.stage`), or None."""
    if context.recipe.checkpoint.stage is None:
        return None
    folder = Path(os.path.expandvars(context.recipe.checkpoint.stage)).expanduser()
    return folder / f"hpc-rl-{os.getuid()}" / context.run_dir.run_id / f"rank_{context.rank}.distcp"
