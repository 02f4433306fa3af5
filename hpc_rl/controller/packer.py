"""Packs the next step beside the loop: a step of a million tokens takes a second, and prompts must not wait.

Small ones are packed at once. The prompt groups do not change any more when a step is reserved, so that the
thread shares nothing with the loop that either writes.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from hpc_rl.controller.batch import BatchOptions, PreparedStep
from hpc_rl.controller.window import Chosen

AT_ONCE_TOKENS = 50_000  # some ten milliseconds
POLL_S = 0.002


class Packer:
    """At most one step is packed and not taken."""

    def __init__(self, options: BatchOptions) -> None:
        self.options = options
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packer")
        self._step: PreparedStep | Future[PreparedStep] | None = None

    @property
    def empty(self) -> bool:
        return self._step is None

    @property
    def busy(self) -> bool:
        """The thread is at work: look again soon."""
        return isinstance(self._step, Future) and not self._step.done()

    def begin(self, chosen: Chosen) -> None:
        assert self._step is None
        tokens = sum(len(t.token_ids) for group in chosen.groups for t in group.trajectories)
        if tokens > AT_ONCE_TOKENS:
            self._step = self._thread.submit(self._pack, chosen)
        else:
            self._step = self._pack(chosen)

    def _pack(self, chosen: Chosen) -> PreparedStep:
        return PreparedStep.of(chosen.step, chosen.groups, self.options, dropped=chosen.dropped_groups)

    def take(self) -> PreparedStep | None:
        """The step, once it is packed. Raises what packing raised."""
        if self._step is None or self.busy:
            return None
        step, self._step = self._step, None
        return step.result() if isinstance(step, Future) else step
