"""The groups that serve models to the rollouts (`reward`, `teacher`): who of them answers, and who is told.

The rollouts ask them directly; the controller only says which processes are there. A replica that begins is
told before it gets its first prompt, and all are told again at every change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hpc_rl.bus import messages as m
from hpc_rl.controller.members import Members, Replica

LOG = logging.getLogger("hpc_rl.controller")


class ScoringGroups:
    """`send(stream, message)` writes to the bus."""

    def __init__(self, members: Members, send: Callable[[str, m.Message], None]) -> None:
        self._members, self._send = members, send

    def ready(self, message: m.ScoringReady) -> None:
        """A process has loaded its models."""
        replica = self._members.find(message.index, message.incarnation, message.role)
        if replica is None:
            return
        LOG.info("%s ready: %s", replica.name, message.info)
        replica.enter("live")
        self.changed(message.role)

    def changed(self, role: str) -> None:
        """Tell every rollout replica who of `role` serves."""
        for rollout in self._members.replicas.values():
            if rollout.state not in ("lost", "stopped"):
                self._tell(rollout, role)

    def introduce(self, rollout: Replica) -> None:
        """Tell one rollout replica who serves."""
        for role in sorted({role for role, _ in self._members.scoring}):
            self._tell(rollout, role)

    def _tell(self, rollout: Replica, role: str) -> None:
        served = [r for r in self._members.scoring.values() if r.role == role and r.state == "live"]
        message = m.ScoringMembers(role, [(r.index, r.incarnation) for r in served])
        self._send(m.answers(rollout.index, rollout.incarnation), message)
