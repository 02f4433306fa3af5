"""What a run tells the world while it runs: metrics.jsonl, W&B, Slurm's job comment.

`metrics.jsonl` has one object per step. An evaluation of step s ends while later steps run, so the
rows from s on are held back until it is done, and written in order.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from hpc_rl.telemetry.console import Pace, job_comment, step_line
from hpc_rl.telemetry.metrics import MetricsLog, read_metrics

LOG = logging.getLogger("hpc_rl.controller")
COMMENT_LIMIT_S = 5.0
COMMENT_EVERY_S = 10.0


class Recorder:
    """The only writer of the run's metrics. `wandb` and `comment` may be None."""

    def __init__(self, path: Path, attempt: int, total: int | None, wandb=None, comment=None) -> None:  # type: ignore[no-untyped-def]
        self.log = MetricsLog(path, attempt)
        self.total = total
        self._wandb, self._comment = wandb, comment
        self._pace = Pace()
        self._rows: dict[int, dict[str, float]] = {}
        self._held: set[int] = set()
        self._commented = 0.0
        self._unshown: dict | None = None  # the newest row, if the comment is older

    @property
    def held_rows(self) -> dict[int, dict[str, float]]:
        """Rows that wait for an evaluation; they travel in the checkpoint."""
        return self._rows

    def restore(self, rows: dict[int, dict[str, float]]) -> None:
        """Take back the rows that were held at a checkpoint, but those written after it."""
        there = {row["step"] for row in read_metrics(self.log.path)}
        self._rows = {**{step: row for step, row in rows.items() if step not in there}, **self._rows}

    def written(self, step: int) -> bool:
        """True if the row of `step` is in the file already (asked once, on resume)."""
        return any(row["step"] == step for row in read_metrics(self.log.path))

    def hold(self, step: int) -> None:
        """The row of `step` waits for an evaluation."""
        self._held.add(step)
        self._rows.setdefault(step, {})

    def release(self, step: int, values: dict[str, float]) -> None:
        """The evaluation of `step` is done (or given up, with no values)."""
        self._held.discard(step)
        self._rows.setdefault(step, {}).update(values)
        self._write()

    def step(self, step: int, values: dict[str, float]) -> None:
        self._rows.setdefault(step, {}).update(values)
        self._write()

    def flush(self) -> None:
        """Write what is still held back, without its evaluation (the run is ending)."""
        self._held.clear()
        self._write()

    def close(self, wandb_s: float) -> None:
        """The last row into the job's comment; end W&B, within `wandb_s` seconds and never with an error."""
        last = self._start_comment(self._unshown) if self._unshown is not None else None
        if self._wandb is not None:
            self._wandb.finish(wandb_s)
        if last is not None:
            last.join(min(COMMENT_LIMIT_S, wandb_s / 2))

    def _write(self) -> None:
        for step in sorted(self._rows):
            if any(held <= step for held in self._held):
                return
            row = self.log.append(step, self._rows.pop(step))
            LOG.info("%s", step_line(row, self.total, self._pace.step(step, self.total)))
            if self._wandb is not None:
                self._wandb.log(row)
            self._show(row)

    def _show(self, row: dict) -> None:
        if self._comment is None:
            return
        if time.monotonic() - self._commented < COMMENT_EVERY_S:
            self._unshown = row
        else:
            self._start_comment(row)

    def _start_comment(self, row: dict) -> threading.Thread:
        """In a thread: slurmctld can take seconds to answer, and the step must not wait for it."""
        self._commented, self._unshown = time.monotonic(), None
        thread = threading.Thread(target=self._comment, args=(job_comment(row, self.total),), daemon=True)
        thread.start()
        return thread
