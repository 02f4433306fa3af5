"""Which replica gets the next prompt group: the one with the fewest in flight, newest weights first.

A group goes to one replica whole: its answers share the prompt's prefix, which is computed once there. Loads
are counted by what was sent and answered, so that a replica is busy until it says that it is not. With
hundreds of replicas the order is kept in a heap: a change costs one entry, and entries that have been
overtaken are skipped when they come up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from hpc_rl.controller.members import Members, Replica
from hpc_rl.controller.pace import InFlightLimit
from hpc_rl.controller.shares import Share
from hpc_rl.types import EngineLoad

Entry = tuple[int, int, int]  # load, -version, index


class Dispatcher:
    """`limit` is prompt groups per replica; None: as many as its engine takes (`pace.py`)."""

    def __init__(self, members: Members, limit: int | None) -> None:
        self._members = members
        self.limits = {index: InFlightLimit(limit) for index in members.replicas}
        self.loads = dict.fromkeys(members.replicas, 0)
        self._limit = limit
        self._heap: list[Entry] = []
        self._stale = True
        self._at_rest = len(self.loads)
        self._idle = Share()

    def changed(self) -> None:
        """A replica became live, got new weights, is receiving some, or is lost."""
        self._stale = True

    # --- loads ------------------------------------------------------------------------------------
    def began(self, index: int) -> None:
        """A prompt group was sent to the replica."""
        self._set(index, self.loads[index] + 1)

    def ended(self, index: int, load: EngineLoad | None = None, group_size: int = 1) -> None:
        """The replica, in its present incarnation, answered one."""
        if load is not None:
            self.limits[index].answered(load, group_size, self.loads[index])
        self._set(index, max(0, self.loads[index] - 1))
        self._push(index)

    def lost(self, index: int) -> None:
        """The replica ended; the next incarnation begins with nothing, and finds its limit anew."""
        self._set(index, 0)
        self.limits[index] = InFlightLimit(self._limit)
        self._stale = True

    def _set(self, index: int, load: int) -> None:
        self._count()
        self._at_rest += (load == 0) - (self.loads[index] == 0)
        self.loads[index] = load

    # --- choosing ---------------------------------------------------------------------------------
    def candidates(self) -> Iterator[Replica]:
        """Replicas with room, the least loaded first, again and again: one that got a group (`began`) comes
        back with its new load; one that did not comes no more."""
        if self._stale:
            self._rebuild()
        aside: list[Entry] = []
        offered: int | None = None
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                if entry != self._entry(entry[2]):
                    continue
                offered = entry[2]
                yield self._members.replicas[offered]
                if self.loads[offered] == entry[0]:
                    aside.append(entry)
                else:
                    self._push(offered)
                offered = None
        finally:
            for entry in aside:
                heapq.heappush(self._heap, entry)
            if offered is not None:  # the caller had enough
                self._push(offered)

    @property
    def all_idle(self) -> bool:
        return self._at_rest == len(self.loads)

    def newest(self) -> int:
        """The newest version of a live replica."""
        return max((r.version for r in self._live() if r.version is not None), default=-1)

    def _entry(self, index: int) -> Entry | None:
        """What the heap should hold of the replica now (None: it gets nothing)."""
        replica = self._members.replicas[index]
        open_for_more = replica.state == "live" and not replica.receiving and replica.version is not None
        if not open_for_more or self.loads[index] >= self.limits[index].groups:
            return None
        assert replica.version is not None
        return (self.loads[index], -replica.version, index)

    def _push(self, index: int) -> None:
        entry = self._entry(index)
        if entry is not None:
            heapq.heappush(self._heap, entry)
        if len(self._heap) > 4 * len(self.loads) + 16:
            self._stale = True

    def _rebuild(self) -> None:
        self._stale = False
        entries = (self._entry(index) for index in self.loads)
        self._heap = [entry for entry in entries if entry is not None]
        heapq.heapify(self._heap)

    def _live(self) -> list[Replica]:
        return [replica for replica in self._members.replicas.values() if replica.state == "live"]

    # --- what is measured -------------------------------------------------------------------------
    def _count(self) -> None:
        """Called before a load changes."""
        self._idle.add(self._at_rest / len(self.loads))

    def metrics(self) -> dict[str, float]:
        """Since the last call. A replica is idle while it has no prompt group, also while it loads."""
        self._count()
        live = [replica.index for replica in self._live()]
        limits = [self.limits[index] for index in live]
        return {
            "time/rollout_idle": self._idle.take(),
            "rollout/waiting": float(sum(limit.load.waiting for limit in limits)),
            "rollout/kv_used": max((limit.load.kv_used for limit in limits), default=0.0),
            "rollout/in_flight_limit": float(sum(limit.groups for limit in limits)),
            "rollout/replicas": float(len(live)),
        }
