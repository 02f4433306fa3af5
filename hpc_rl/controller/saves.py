"""Checkpoints from the controller's side: when, its own part, COMPLETE, retention, exports.

A checkpoint of step s is the policy's part (DCP, written in the background by its ranks) and the
controller's part (a few files, written at once when the save is commanded). The command follows the
`TrainStep` of s in every rank's inbox, so both parts describe the same moment. COMPLETE is written last,
when rank 0 reports the policy's part on disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from hpc_rl.bus.messages import CheckpointSaved, ExportModel, Message, ModelExported, SaveCheckpoint
from hpc_rl.checkpoint.layout import retain, write_complete
from hpc_rl.recipe.schema import Checkpoint
from hpc_rl.run.paths import RunDir

LOG = logging.getLogger("hpc_rl.controller")
SAVE_LIMIT_S = 1800.0


class Saves:
    """`command` sends to every policy rank; `write_state(folder, step)` writes the controller's part."""

    def __init__(
        self,
        run: RunDir,
        options: Checkpoint,
        *,
        command: Callable[[Message], None],
        write_state: Callable[..., None],
    ) -> None:
        self.run, self.options = run, options
        self._command, self._write_state = command, write_state
        self._saving: dict[int, float] = {}
        self._exporting: dict[str, float] = {}
        self.last_saved = -1

    @property
    def busy(self) -> list[str]:
        """What is still being written, in words."""
        return [f"checkpoint of step {step}" for step in self._saving] + [
            f"export {label}" for label in self._exporting
        ]

    def due(self, step: int, final: bool) -> bool:
        return self.options.enabled and step > 0 and (final or step % self.options.save_every == 0)

    def save(self, step: int) -> None:
        """Command the checkpoint of `step`, the last step that was commanded. Once per step."""
        if step == self.last_saved or step <= 0:
            return
        folder = self.run.checkpoint(step)
        (folder / "controller").mkdir(parents=True, exist_ok=True)
        self._write_state(folder / "controller", step)
        self._command(SaveCheckpoint(step, sync=self.options.mode == "sync"))
        self._saving[step] = time.monotonic()
        self.last_saved = step
        if self.options.export == "all":
            self.export(step, folder.name)

    def export(self, step: int, label: str) -> None:
        self._command(ExportModel(step, label))
        self._exporting[label] = time.monotonic()

    def saved(self, message: CheckpointSaved) -> None:
        """The policy's part is on disk (or failed: said loudly, the run goes on to the next save)."""
        started = self._saving.pop(message.step, None)
        if message.error:
            LOG.error("checkpoint of step %d FAILED: %s", message.step, message.error)
            return
        folder = self.run.checkpoint(message.step)
        write_complete(folder)
        taken = time.monotonic() - started if started else message.seconds
        LOG.info("checkpoint of step %d complete after %.1f s: %s", message.step, taken, folder)
        for gone in retain(self.run.checkpoints, self.options.max_keep):
            LOG.info("removed superseded checkpoint %s", gone)

    def exported(self, message: ModelExported) -> None:
        self._exporting.pop(message.label, None)
        if message.error:
            LOG.error("export %s FAILED: %s", message.label, message.error)
        else:
            LOG.info("exported step %d to %s in %.1f s", message.step, message.path, message.seconds)

    def overdue(self) -> str | None:
        """Names what has been in writing for too long, or None."""
        now = time.monotonic()
        for what, started in [*self._saving.items(), *self._exporting.items()]:
            if now - started > SAVE_LIMIT_S:
                return f"policy rank 0 has not finished saving {what!r} after {SAVE_LIMIT_S:.0f} s"
        return None
