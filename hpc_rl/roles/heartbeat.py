"""The heartbeat thread: says every two seconds that the process lives and what it is doing.

It also watches what the process hangs on: when the bus is lost for good or the parent is gone, the
process has no purpose any more and ends, with its cause on disk. And it is how the supervisor asks a
step to end: Slurm has no safe way to send SIGTERM to the tasks of one step (the death of its `srun` kills
them at once), so the supervisor leaves a word on the bus and the thread raises SIGTERM here.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from hpc_rl.bus.client import Bus
from hpc_rl.bus.errors import BusLost

INTERVAL_S = 2.0


def end_key(role: str, index: int) -> str:
    """The bus value that asks the step of `role` to end: it holds the incarnation that is meant."""
    return f"end:{role}:{0 if role == 'policy' else index}"


class Heartbeat:
    """Beats until `stop`. `payload` is called for each beat; `orphaned(cause)` must end the process."""

    def __init__(
        self,
        bus: Bus,
        role: str,
        index: int,
        incarnation: int,
        payload: Callable[[], dict[str, Any]],
        orphaned: Callable[[str], None],
    ) -> None:
        self._bus = bus
        self._who = (role, index)
        self._payload = payload
        self._orphaned = orphaned
        self._end_word = str(incarnation).encode()
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
                if self._bus.get_value(end_key(*self._who)) == self._end_word:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
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
