"""Which version is evaluated now or next, and whether it can still be had.

An evaluation of version v needs live replicas with exactly v. The policy may train on once v was sent; after
that nobody can make v again. If the replicas that had it are lost, the evaluation is given up: its row is
written without it, where waiting on would hold the run back for ever.
"""

from __future__ import annotations

import logging

from hpc_rl.controller.evaluation import Evaluator
from hpc_rl.controller.members import Members
from hpc_rl.controller.pushes import Pushes
from hpc_rl.controller.recorder import Recorder
from hpc_rl.run.events import EventLog

LOG = logging.getLogger("hpc_rl.controller")


class EvaluationTurn:
    """`awaiting` is the version whose evaluation has not begun."""

    def __init__(
        self, evaluator: Evaluator, recorder: Recorder, members: Members, pushes: Pushes, events: EventLog
    ) -> None:
        self._evaluator, self._recorder = evaluator, recorder
        self._members, self._pushes, self._events = members, pushes, events
        self.awaiting: int | None = None

    @property
    def version(self) -> int | None:
        """The version that is evaluated now or next."""
        now = self._evaluator.current
        return now.step if now is not None else self.awaiting

    @property
    def free(self) -> bool:
        """An evaluation that is still running makes the next one fall out, except the last."""
        return self.version is None

    def expect(self, step: int) -> None:
        """Hold the row of `step` back, and the next step too until the replicas were sent version `step`."""
        if self._recorder.written(step):
            return
        self._recorder.hold(step)
        self.awaiting = step

    def must_be_sent(self, step: int) -> bool:
        """The policy, now at `step`, has to send its weights before it trains on."""
        return self.awaiting == step > self._pushes.newest

    def allows_push(self, version: int) -> bool:
        """While an evaluation runs, only the version that it evaluates may reach a replica."""
        return self._evaluator.current is None or self._evaluator.current.step == version

    def begin_if_ready(self) -> None:
        """Once every live replica has exactly the version that is to be evaluated."""
        if self.awaiting is None or self._pushes.under_way is not None:
            return
        if self._live_versions() == {self.awaiting}:
            self._evaluator.begin(self.awaiting)
            self.awaiting = None

    def give_up_if_lost(self, commanded: int) -> None:
        """`commanded` is the last step that was sent to the policy: it makes only newer versions now."""
        version = self.version
        if version is None or commanded <= version or self._pushes.under_way == version:
            return
        live = self._live_versions()
        if live == {version} or (self._evaluator.current is not None and version in live):
            return
        LOG.warning("evaluation at step %d given up: no replica has version %d any more", version, version)
        self._events.append("evaluation_lost", step=version)
        self._evaluator.current = self.awaiting = None
        self._recorder.release(version, {})

    def _live_versions(self) -> set[int | None]:
        return {r.version for r in self._members.replicas.values() if r.state == "live"}
