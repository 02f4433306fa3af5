"""One push of new weights at a time: sent to whom, acknowledged by whom, and since when.

A push is over when policy rank 0 has reported it and every receiver has acknowledged it or is lost. Only
the acknowledgement makes it the replica's version (and lets it start prompts of newer windows).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from hpc_rl.bus import messages as m
from hpc_rl.controller.members import Members, Replica

SLACK_S = 60.0


class Pushes:
    """`to_policy` sends to every policy rank, `to_replica(index, message)` to one replica."""

    def __init__(
        self,
        members: Members,
        *,
        to_policy: Callable[[m.Message], None],
        to_replica: Callable[[int, m.Message], None],
        timeout_s: float,
    ) -> None:
        self._members, self._to_policy, self._to_replica = members, to_policy, to_replica
        self._limit_s = timeout_s + SLACK_S
        self._since = 0.0
        self._reported = True
        self.under_way: int | None = None  # the version
        self.newest = -1  # newest version that was sent to anyone (0: what the engines loaded)
        self.seconds, self.nbytes = 0.0, 0  # of the last push, as rank 0 measured it

    def behind(self, version: int) -> list[Replica]:
        """Replicas that are loaded and do not have `version`."""
        return [
            replica
            for replica in self._members.replicas.values()
            if replica.state in ("loaded", "live") and (replica.version is None or replica.version < version)
        ]

    def begin(self, version: int, replicas: Iterable[Replica]) -> None:
        chosen = list(replicas)
        for replica in chosen:
            replica.receiving = True
            self._to_replica(replica.index, m.ReceiveWeights(version))
        self._to_policy(m.PushWeights(version, [r.index for r in chosen], [r.incarnation for r in chosen]))
        self.under_way, self.newest = version, version
        self._since, self._reported = time.monotonic(), False

    def applied(self, message: m.WeightsApplied) -> None:
        replica = self._members.find(message.replica, message.incarnation)
        if replica is None:
            return
        replica.version, replica.receiving = message.version, False
        if replica.state == "loaded":
            replica.enter("live")
        self.settle()

    def failed(self, message: m.WeightsFailed) -> None:
        replica = self._members.find(message.replica, message.incarnation)
        if replica is not None:
            self._members.lose(replica, f"weights of version {message.version} failed: {message.cause}")

    def reported(self, message: m.WeightsPushed) -> None:
        """Rank 0 is done. Receivers it could not reach are lost, unless they were meanwhile replaced."""
        self._reported, self.seconds, self.nbytes = True, message.seconds, message.nbytes
        for index, cause in message.failed.items():
            replica = self._members.replicas[int(index)]
            if replica.receiving:
                self._members.lose(replica, f"push of version {message.version}: {cause}")
        self.settle()

    def settle(self) -> None:
        """Called after anything that may end the push (a lost replica, too)."""
        if self._reported and not any(r.receiving for r in self._members.replicas.values()):
            self.under_way = None

    def overdue(self) -> str | None:
        """Names who has not finished the push, or None."""
        if self.under_way is None or time.monotonic() - self._since < self._limit_s:
            return None
        silent = [r.name for r in self._members.replicas.values() if r.receiving]
        who = ", ".join(silent) if self._reported else "policy rank 0"
        return f"{who}: the push of version {self.under_way} is not finished after {self._limit_s:.0f} s"
