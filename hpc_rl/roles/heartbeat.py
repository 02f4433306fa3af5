"""The heartbeat thread: says every two seconds that the process lives and what it is doing.

It also watches what the process hangs on: when the bus is lost for good or the parent is gone, the
process has no purpose any more and ends, with its cause on disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from hpc_rl.bus.client import Bus
from hpc_rl.bus.errors import BusLost

INTERVAL_S = 2.0


class Heartbeat:
    """Beats until `stop`. `payload` is called for each beat; `orphaned(cause)` must end the process."""

    def __init__(
        self,
        bus: Bus,
        role: str,
        index: int,
        payload: Callable[[], dict[str, Any]],
        orphaned: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._who = (role, index)
        self._payload = payload
        self._orphaned = orphaned
        self._parent = os.getppid()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """The first beat is sent before this returns. Raises BusLost."""
        self._bus.heartbeat(*self._who, self._payload())
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(INTERVAL_S)

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            if os.getppid() != self._parent:
                self._orphaned(f"the parent process {self._parent} is gone")
            try:
                self._bus.heartbeat(*self._who, self._payload())
            except BusLost as error:
                if not self._stopping.is_set():
                    self._orphaned(f"BusLost: {error}")
                return


class Phase:
    """What a process is doing since when, and for how long it may."""

    def __init__(self, name: str, limit_s: float | None = None) -> None:
        self.name = name
        self.limit_s = limit_s
        self.since = time.time()
