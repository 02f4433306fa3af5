"""A run on this machine: its supervisor as a detached process, found again by pid and start time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hpc_rl.run.paths import RunDir, RunError, write_private
from hpc_rl.run.process import start_ticks

# By name: this room stands below the supervisor's and does not import it.
SUPERVISOR = "hpc_rl.supervisor"
LocalState = Literal["RUNNING", "ENDED", "ELSEWHERE"]


@dataclass(frozen=True)
class LocalProcess:
    """The supervisor of a local run. `ticks` (its start time) tells it from a later owner of the pid."""

    host: str
    pid: int
    ticks: int
    started: float


def start_supervisor(run: RunDir, *, module: str = SUPERVISOR, cwd: Path | None = None) -> int:
    """Start `python -m module RUN_DIR` detached from this terminal; its pid, which is also its session's.

    It outlives this process and its terminal. Output goes to `logs/job.log` until the supervisor opens
    its attempt's own log. Raises RunError if one runs already.
    """
    if local_state(run) == "RUNNING":
        raise RunError(f"a supervisor runs already on {run.root}; `hpc-rl cancel` ends it")
    run.logs.mkdir(parents=True, exist_ok=True)
    log = os.open(run.logs / "job.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", module, str(run.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=cwd or run.root,
        )
    finally:
        os.close(log)
    # One that died within this instant leaves 0 behind, which no live process has.
    ticks = start_ticks(process.pid) or 0
    record = LocalProcess(socket.gethostname(), process.pid, ticks, time.time())
    write_private(_file(run), json.dumps(asdict(record)).encode())
    return process.pid


def read_local(run: RunDir) -> LocalProcess | None:
    """Who was started last for this run on a machine; None if nobody."""
    try:
        return LocalProcess(**json.loads(_file(run).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def local_state(run: RunDir) -> LocalState:
    """Whether the supervisor started last still runs; ELSEWHERE if that was on another host."""
    record = read_local(run)
    if record is None:
        return "ENDED"
    if record.host != socket.gethostname():
        return "ELSEWHERE"
    return "RUNNING" if _alive(record) else "ENDED"


def cancel_local(run: RunDir, *, grace_s: float = 7.0, kill_s: float = 5.0) -> bool:
    """SIGTERM to the supervisor, after `grace_s` SIGKILL to its whole session; True when it is gone.

    Raises RunError if it runs on another host.
    """
    record = read_local(run)
    if record is None:
        return True
    if record.host != socket.gethostname():
        raise RunError(f"the supervisor runs on {record.host}: log in there and run the same command")
    if not _alive(record):
        return True
    _signal(os.kill, record.pid, signal.SIGTERM)
    if _wait_gone(record, grace_s):
        return True
    # The pid of a live session leader names its process group too, so this cannot hit a stranger.
    _signal(os.killpg, record.pid, signal.SIGKILL)
    return _wait_gone(record, kill_s)


def _alive(record: LocalProcess) -> bool:
    ticks = start_ticks(record.pid)
    return ticks is not None and ticks == record.ticks


def _signal(send: Callable[[int, int], None], number: int, what: int) -> None:
    try:
        send(number, what)
    except ProcessLookupError:
        pass  # it ended by itself in between


def _wait_gone(record: LocalProcess, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while _alive(record):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _file(run: RunDir) -> Path:
    return run.root / "local.json"
