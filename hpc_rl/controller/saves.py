"""Checkpoints from the controller's side: when, its own part, COMPLETE, retention, exports.

A checkpoint of step s is the policy's part (DCP, written in the background by its ranks) and the
controller's part (a few files, written at once when the save is commanded). The command follows the
`TrainStep` of s in every rank's inbox, so both parts describe the same moment. COMPLETE is written last,
when rank 0 reports the policy's part on disk. A save that fails costs that checkpoint and nothing
else: training goes on, the previous one stays, and the next save comes at its time.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hpc_rl.bus.messages import CheckpointSaved, ExportModel, Message, ModelExported, SaveCheckpoint
from hpc_rl.checkpoint import layout
from hpc_rl.controller.best import BestCheckpoint
from hpc_rl.controller.uploads import Uploads
from hpc_rl.recipe.schema import Checkpoint
from hpc_rl.run.paths import RunDir

LOG = logging.getLogger("hpc_rl.controller")
SAVE_LIMIT_S = 1800.0
SKIP_AFTER_S = 60.0  # as long as the policy would wait for the save before
LAST_TRIES, LAST_PAUSE_S = 3, 10.0
LOUD_AFTER = 3


class LastSaveFailed(RuntimeError):
    """The state after the last step could not be saved, in several tries."""


class Saves:
    """`command` sends to every policy rank; `write_state(folder, step)` writes the controller's part;
    `tell(kind, **fields)` is for events.jsonl, from which `status` learns what became of saves."""

    def __init__(
        self,
        run: RunDir,
        options: Checkpoint,
        *,
        command: Callable[[Message], None],
        write_state: Callable[..., None],
        tell: Callable[..., None],
        uploads: Uploads,
        best_mode: str | None = None,
    ) -> None:
        self.run, self.options, self.uploads = run, options, uploads
        self._command, self._write_state, self._tell = command, write_state, tell
        self._saving: dict[int, float] = {}
        self._exporting: dict[str, float] = {}
        self.best = BestCheckpoint(run, options.enabled and options.keep_best, best_mode)
        self._sweeper: threading.Thread | None = None
        self._last_tries, self._retry_at, self._final_tries = 0, 0.0, 0
        self.last_saved = -1  # commanded
        self.last_complete = -1
        self.failures, self.last_error = 0, ""  # in a row

    @property
    def busy(self) -> list[str]:
        """What is still being written, in words."""
        return [f"checkpoint of step {step}" for step in self._saving] + [
            f"export {label}" for label in self._exporting
        ]

    def restored(self, step: int) -> None:
        """The policy starts after `step`: from its checkpoint, or from the beginning."""
        self.last_saved = self.last_complete = step

    def has(self, step: int) -> bool:
        """Whether the checkpoint of `step` is complete or being written."""
        return step in self._saving or step in self.run.complete_steps()

    def due(self, step: int, final: bool) -> bool:
        return self.options.enabled and step > 0 and (final or step % self.options.save_every == 0)

    def save(self, step: int) -> None:
        """Command the checkpoint of `step`, the last step that was commanded. Once per step.

        Skipped while the one before has been in writing for so long that the policy would have to wait.
        """
        if step == self.last_saved or step <= 0:
            return
        now = time.monotonic()
        slow = [earlier for earlier, since in self._saving.items() if now - since > SKIP_AFTER_S]
        if slow:
            LOG.warning("step %d is not saved: that of step %d is still being written", step, slow[0])
            self._tell("checkpoint_skipped", step=step, writing=slow[0])
            self.best.failed(step)
            return
        folder = self.run.checkpoint(step)
        self.last_saved = step
        try:
            layout.claim(folder)
            (folder / "controller").mkdir(parents=True)
            self._write_state(folder / "controller", step)
        except OSError as error:  # the ranks are not asked: their part would be of no use
            self._failed(step, f"the controller's part: {error}")
            return
        self._command(SaveCheckpoint(step, sync=self.options.mode == "sync"))
        self._saving[step] = now
        self._sweep()
        if self.options.export == "all" and self._last_tries <= 1:
            self._export_too(step, folder.name)

    def conclude(self, step: int) -> bool:
        """Whether the state after the last step is saved; asked until it is. Starts what is missing.

        Raises LastSaveFailed after several tries.
        """
        if step <= 0 or not self.options.enabled or self.last_complete == step:
            return True
        if self._saving or time.monotonic() < self._retry_at:
            return False
        if self._last_tries >= LAST_TRIES:
            raise LastSaveFailed(
                f"the checkpoint of the last step ({step}) could not be saved in {LAST_TRIES} tries: "
                f"{self.last_error}"
            )
        if self.last_saved == step and self.last_error:  # tried before and failed
            self.last_saved = -1
        self._last_tries += 1
        self._retry_at = time.monotonic() + LAST_PAUSE_S
        self.save(step)
        return False

    def _export_too(self, step: int, label: str) -> None:
        """The export of a checkpoint, unless the policy would have to wait for the one before."""
        slow = [other for other, since in self._exporting.items() if time.monotonic() - since > SKIP_AFTER_S]
        if slow:
            LOG.warning("step %d is not exported: %s is still being written", step, slow[0])
            self._tell("export_failed", step=step, label=label, error=f"{slow[0]} was still being written")
        else:
            self.export(step, label)

    def export(self, step: int, label: str) -> None:
        self._final_tries += label == "final"
        self._command(ExportModel(step, label))
        self._exporting[label] = time.monotonic()

    def saved(self, message: CheckpointSaved) -> None:
        """The policy's part is on disk (or failed: said loudly, the run goes on to the next save)."""
        started = self._saving.pop(message.step, None)
        folder = self.run.checkpoint(message.step)
        if message.error:
            self._failed(message.step, message.error)
            return
        try:
            layout.write_complete(folder)
        except (OSError, ValueError) as error:
            self._failed(message.step, str(error))
            return
        taken = time.monotonic() - started if started else message.seconds
        self.last_complete, self.failures, self.last_error = message.step, 0, ""
        LOG.info("checkpoint of step %d complete after %.1f s: %s", message.step, taken, folder)
        self._tell("checkpoint_complete", step=message.step, seconds=round(taken, 3))
        self.best.saved(message.step)
        self.uploads.written(f"{folder.parent.name}/{folder.name}")
        self._retain()

    def exported(self, message: ModelExported) -> None:
        self._exporting.pop(message.label, None)
        if not message.error:
            LOG.info("exported step %d to %s in %.1f s", message.step, message.path, message.seconds)
            self._tell("exported", step=message.step, label=message.label, seconds=round(message.seconds, 3))
            self.uploads.written(f"{self.run.safetensors.name}/{message.label}")
            return
        LOG.error("export %s FAILED: %s", message.label, message.error)
        self._tell("export_failed", step=message.step, label=message.label, error=message.error)
        if message.label == "final" and self._final_tries < LAST_TRIES:
            self.export(message.step, message.label)

    def overdue(self) -> str | None:
        """Names what has been in writing for too long, or None."""
        now = time.monotonic()
        for what, started in [*self._saving.items(), *self._exporting.items()]:
            if now - started > SAVE_LIMIT_S:
                return f"policy rank 0 has not finished saving {what!r} after {SAVE_LIMIT_S:.0f} s"
        return None

    def evaluated(self, step: int, metric: str, value: float | None) -> bool:
        """The validation of `step` is known; True if it is the best so far (see `best`). What waited for it
        may go now."""
        improved = self.best.judge(step, metric, value)
        self._retain()
        return improved

    def tidy(self) -> None:
        """At the end: no evaluation will be answered any more."""
        self.best.forget_expected()
        self._retain()

    # --- what is on disk -----------------------------------------------------------------------------
    def _failed(self, step: int, error: str) -> None:
        self.failures, self.last_error = self.failures + 1, error
        LOG.error("checkpoint of step %d FAILED: %s; training goes on", step, error)
        if self.failures >= LOUD_AFTER:
            LOG.critical(
                "the last %d checkpoints FAILED; everything after step %d is lost if the run ends now",
                self.failures,
                max(self.last_complete, 0),
            )
        self._tell("checkpoint_failed", step=step, error=error, in_a_row=self.failures)
        self.best.failed(step)
        try:
            layout.clear_failed(self.run.checkpoint(step))
            if any(os.strerror(code) in error for code in (errno.ENOSPC, errno.EDQUOT)):
                for folder in layout.clear_dead(self.run.checkpoints, writing=self._saving):
                    LOG.warning("removed the unfinished %s of an earlier attempt, to make room", folder)
        except OSError as lost:
            LOG.error("what is left of step %d cannot be removed: %s", step, lost)
        self._sweep()

    def _retain(self) -> None:
        try:
            gone = layout.supersede(
                self.run.checkpoints,
                self.options.max_keep,
                protected={*self.best.protected, *self.uploads.steps},
                writing=self._saving,
            )
        except OSError as error:
            LOG.error("superseded checkpoints cannot be removed: %s", error)
            return
        for folder in gone:
            LOG.info("removed superseded checkpoint %s", folder)
        self._sweep()

    def _sweep(self) -> None:
        """In a thread: removing terabytes from a parallel filesystem takes minutes."""
        if self._sweeper is None or not self._sweeper.is_alive():
            checkpoints: Path = self.run.checkpoints
            self._sweeper = threading.Thread(target=layout.sweep, args=(checkpoints,), daemon=True)
            self._sweeper.start()
