"""Keeps the best checkpoint by validation: which one it is, and that retention leaves it alone."""

from __future__ import annotations

import logging

from hpc_rl.run.best import Best, improves, read_best, write_best
from hpc_rl.run.paths import RunDir
from hpc_rl.telemetry.metrics import read_metrics, surviving

LOG = logging.getLogger("hpc_rl.controller")


class BestCheckpoint:
    """`best` is on disk and recorded; `candidate` is better, and its checkpoint is being written. `mode` says
    whether more or less of the metric is better (`run.best.improves`)."""

    def __init__(self, run: RunDir, enabled: bool, mode: str | None = None) -> None:
        self.run, self.enabled, self.mode = run, enabled, mode
        self.best: Best | None = None
        self.candidate: Best | None = None
        self._expected: set[int] = set()

    def restore(self, step: int, metric: str) -> None:
        """Read the record back on a start at `step`. One of a later step was rolled back, and one by another
        metric says nothing: then the best of the complete checkpoints that are left, by the metrics that are
        left."""
        if not self.enabled:
            return
        self.best = read_best(self.run)
        if self.best is not None and self.best.step <= step and self.best.metric == metric:
            return
        found = None
        there = set(self.run.complete_steps())
        for row in surviving(read_metrics(self.run.metrics)):
            value = row.get(metric)
            if row["step"] > step or row["step"] not in there or not isinstance(value, int | float):
                continue
            if improves(metric, value, found, self.mode):
                found = Best(row["step"], metric, float(value))
        self._record(found)

    def expect(self, step: int) -> None:
        """The checkpoint of `step` is kept until its validation is known."""
        if self.enabled:
            self._expected.add(step)

    def forget_expected(self) -> None:
        self._expected.clear()

    def judge(self, step: int, metric: str, value: float | None) -> bool:
        """Take the validation of `step` (None: it was given up); True if it is the best so far."""
        self._expected = {other for other in self._expected if other > step}
        if not self.enabled or value is None:
            return False
        if not improves(metric, value, self.candidate or self.best, self.mode):
            return False
        self.candidate = Best(step, metric, value)
        if step in self.run.complete_steps():
            self.saved(step)
        return True

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is complete."""
        if self.candidate is not None and self.candidate.step == step:
            self._record(self.candidate)
            self.candidate = None
            LOG.info("best checkpoint so far: %s", self.best)

    def failed(self, step: int) -> None:
        """The checkpoint of `step` could not be written (or is not written at all)."""
        if self.candidate is not None and self.candidate.step == step:
            self.candidate = None

    @property
    def protected(self) -> set[int]:
        """Steps whose checkpoints retention must leave."""
        return self._expected | {found.step for found in (self.best, self.candidate) if found is not None}

    def _record(self, best: Best | None) -> None:
        try:
            write_best(self.run, best)
        except OSError as error:  # a full disk: the checkpoint is there and stays, only its record is not
            LOG.error("the best checkpoint (%s) could not be recorded: %s", best, error)
        self.best = best
