"""The profiler window: torch.profiler over a few steps of some ranks, as Chrome traces."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from hpc_rl.recipe.schema import Profile

LOG = logging.getLogger("hpc_rl.policy")


class StepProfiler:
    """`before` and `after` are called around every step. Writes `<folder>/rank_<r>_steps_<a>-<b>.json`,
    which chrome://tracing and Perfetto open."""

    def __init__(self, options: Profile | None, folder: Path, rank: int) -> None:
        self.options = options if options is not None and rank in options.ranks else None
        self.folder, self.rank = folder, rank
        self._running: profile | None = None

    def before(self, step: int) -> None:
        if self.options is None or step != self.options.start:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._running = profile(activities=activities, profile_memory=self.options.memory)
        self._running.start()

    def after(self, step: int) -> None:
        if self._running is None or self.options is None:
            return
        last = self.options.start + self.options.steps - 1
        if step < last:
            return
        running, self._running = self._running, None
        running.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"rank_{self.rank}_steps_{self.options.start}-{last}.json"
        running.export_chrome_trace(str(target))
        LOG.info("profile of steps %d to %d: %s", self.options.start, last, target)

    def close(self) -> None:
        """A run that ends inside the window leaves no trace."""
        if self._running is not None:
            self._running.stop()
            self._running = None
