"""One supervisor per run: a lock file that holds on shared filesystems without flock.

The file is made by `link`, which is atomic on NFS and Lustre too, and says who holds it. The holder
touches it every few seconds; it is stale when its process is gone (same host), when the same Slurm
job started again, when Slurm says that the job is over, or when nobody touched it for a while.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_rl.run.paths import RunDir, RunError
from hpc_rl.run.process import start_ticks

STALE_S = 120.0
JobAlive = Callable[[str], "bool | None"]


@dataclass(frozen=True)
class Holder:
    """Who holds the lock. `ticks` is the start time of `pid` on `host`."""

    host: str
    pid: int
    ticks: int
    job_id: str | None
    restart_count: int
    time: float
    token: str

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}"


class LockHeld(RunError):
    """Another supervisor works on this run."""


class LockLost(RunError):
    """Somebody else took the lock of this run away."""


class RunLock:
    """The lock of one run for this process. `acquire`, then `refresh` often, then `release`."""

    def __init__(self, run: RunDir, *, job_id: str | None = None, restart_count: int = 0) -> None:
        self._path = run.lock
        pid = os.getpid()
        token = f"{socket.gethostname()}-{pid}-{time.time_ns()}"
        self._me = Holder(
            socket.gethostname(), pid, start_ticks(pid) or 0, job_id, restart_count, time.time(), token
        )

    def acquire(self, job_alive: JobAlive | None = None) -> None:
        """Take the lock. Raises LockHeld naming the holder if it is alive (or may be)."""
        own = self._path.with_name(f".lock-{self._me.token}")
        own.write_text(json.dumps(asdict(self._me)))
        try:
            for _ in range(5):
                try:
                    os.link(own, self._path)
                    return
                except FileExistsError:
                    holder = read_holder(self._path)
                    if holder is None:
                        continue
                    if self._alive(holder, own, job_alive):
                        raise LockHeld(
                            f"the run is held by {holder}; cancel it first, or remove {self._path} "
                            "if that process is surely gone"
                        ) from None
                    self._break(holder)
            raise LockHeld(f"others are taking {self._path} at the same time; try again")
        finally:
            own.unlink()

    def refresh(self) -> None:
        """Say that the holder lives. Raises LockLost if the lock is no longer ours."""
        holder = read_holder(self._path)
        if holder is None or holder.token != self._me.token:
            raise LockLost(f"the run lock was taken over by {holder or 'nobody'}")
        os.utime(self._path)

    def release(self) -> None:
        """Give the lock back if it is still ours."""
        holder = read_holder(self._path)
        if holder is not None and holder.token == self._me.token:
            self._path.unlink(missing_ok=True)

    def _alive(self, holder: Holder, own: Path, job_alive: JobAlive | None) -> bool:
        if holder.job_id is not None and holder.job_id == self._me.job_id:
            # The same Slurm job started again: its earlier start is over.
            return holder.restart_count >= self._me.restart_count and _process_alive(holder, own, self._path)
        if holder.job_id is not None and job_alive is not None:
            known = job_alive(holder.job_id)
            if known is not None:
                return known
        return _process_alive(holder, own, self._path)

    def _break(self, stale: Holder) -> None:
        aside = self._path.with_name(f".lock-broken-{self._me.token}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        taken = read_holder(aside)
        if taken is not None and taken.token != stale.token:
            try:  # somebody was faster: what we took away is their new lock, give it back
                os.link(aside, self._path)
            except FileExistsError:
                pass  # a third one has it; `refresh` tells the second
        aside.unlink()


def _process_alive(holder: Holder, own: Path, path: Path) -> bool:
    if holder.host == socket.gethostname():
        return start_ticks(holder.pid) == holder.ticks
    try:
        age = own.stat().st_mtime - path.stat().st_mtime  # both by the file server's clock
    except FileNotFoundError:
        return False
    return age < STALE_S


def read_holder(path: Path) -> Holder | None:
    """Who holds the lock file `path`, alive or not; None if there is none."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def live_holder(run: RunDir) -> Holder | None:
    """The holder of the run's lock if it seems alive from here (same host: its process; else: fresh)."""
    holder = read_holder(run.lock)
    if holder is None:
        return None
    if holder.host == socket.gethostname():
        return holder if start_ticks(holder.pid) == holder.ticks else None
    probe = run.root / f".lock-probe-{os.getpid()}"
    probe.touch()
    try:
        return holder if _process_alive(holder, probe, run.lock) else None
    finally:
        probe.unlink()
