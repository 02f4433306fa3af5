"""Redis as the supervisor keeps it: started, found dead, mended a few times, never silently."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hpc_rl.bus.errors import RedisFailed
from hpc_rl.bus.server import RedisServer
from hpc_rl.run.events import EventLog
from hpc_rl.run.paths import RunDir

LOG = logging.getLogger("hpc_rl.supervisor")
RESTARTS = 3
WINDOW_S = 600.0
_RESTART_S = 8.0


class KeptRedis:
    """`mend` restarts Redis on its data; more than RESTARTS times in WINDOW_S raises RedisFailed."""

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        events: EventLog,
        hosts: Sequence[str],
        *,
        scratch: Path,
        binary: str | None,
    ) -> None:
        scratch = scratch if scratch.is_dir() else Path(tempfile.gettempdir())
        prefix = f"hpc-rl-redis-{run.run_id}-"
        for left in scratch.glob(f"{prefix}*"):  # of a supervisor that was killed; we hold the run's lock
            if left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=scratch))
        self._server = RedisServer(folder, hosts, binary=binary)
        self._bus_file = run.bus_file(attempt)
        self._events = events
        self._restarts: list[float] = []

    def start(self) -> None:
        """Raises RedisMissing or RedisFailed."""
        self._server.start()
        self._server.write_bus_file(self._bus_file)
        self._events.append(
            "redis_started", host=self._server.hosts[0], port=self._server.port, pid=self._server.pid
        )

    @property
    def ended(self) -> bool:
        return self._server.poll() is not None

    @property
    def mended_at(self) -> float:
        """Time of the last restart (0.0: never)."""
        return self._restarts[-1] if self._restarts else 0.0

    def mend(self, why: str = "") -> None:
        """Start it again with its data. `why` says what was wrong where it still runs."""
        why = why or self._server.explain()
        now = time.time()
        self._restarts = [moment for moment in self._restarts if moment > now - WINDOW_S]
        if len(self._restarts) >= RESTARTS:
            raise RedisFailed(f"Redis was lost {RESTARTS + 1} times in {WINDOW_S / 60:.0f} minutes; {why}")
        self._restarts.append(now)
        LOG.warning("Redis is restarted (%d of %d): %s", len(self._restarts), RESTARTS, why)
        self._server.restart(_RESTART_S)
        self._server.write_bus_file(self._bus_file)
        self._events.append("redis_restarted", why=why, port=self._server.port, pid=self._server.pid)

    def stop(self) -> None:
        """Redis, its data and the bus file are gone afterwards."""
        self._bus_file.unlink(missing_ok=True)
        self._server.stop()
