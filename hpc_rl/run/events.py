"""events.jsonl (what happened), cause files, and the first cause of a failure.

The first cause is what `status` shows even when the bus, the controller and all roles are gone: it
is worked out from the cause files that roles leave in the log folder and from `failure` events.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rl.run import jsonl
from hpc_rl.run.paths import RunDir

# Roles whose processes are lost and come back one by one; the others end the attempt.
REPLICA_ROLES = ("rollout", "reward", "teacher")
# A lost replica does not end an attempt; its cause counts only when what did end it came this soon after.
REPLICA_WINDOW_S = 60.0
# Peers of a dead process report a broken connection, sometimes before the death itself is seen.
ECHO_WINDOW_S = 20.0
_ECHOES = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "socket timeout",
    "nccl",
    "buslost",
    "the parent process",  # an orphan of a killed supervisor; `roles/heartbeat.py` words it
)
SILENT_END = "ended without a word (SIGKILL or node loss)"


@dataclass(frozen=True)
class Cause:
    """Why something failed: `role`/`index` say who, `time` is seconds since the epoch."""

    time: float
    role: str
    index: int
    cause: str
    phase: str = ""
    exit_code: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        who = self.role if self.role in ("redis", "supervisor", "controller") else f"{self.role} {self.index}"
        return f"{who}{f' ({self.phase})' if self.phase else ''}: {self.cause}"


class EventLog:
    """Appends to events.jsonl; every entry has `time`, `kind` and `attempt`."""

    def __init__(self, run: RunDir, attempt: int) -> None:
        self._file = jsonl.Appender(run.events)
        self._attempt = attempt

    def append(self, kind: str, **fields: Any) -> None:
        self._file.append({"time": time.time(), "kind": kind, "attempt": self._attempt, **fields})

    def failure(self, role: str, cause: str, *, index: int = 0, **fields: Any) -> None:
        """An event that `first_cause` considers."""
        self.append("failure", role=role, index=index, cause=cause, **fields)


def read_events(run: RunDir, attempt: int | None = None) -> list[dict[str, Any]]:
    return [e for e in jsonl.read(run.events) if attempt is None or e.get("attempt") == attempt]


def cause_file(run: RunDir, attempt: int, role: str, index: int) -> Path:
    return run.attempt_logs(attempt) / f"cause_{role}_{index}.json"


def write_cause(run: RunDir, attempt: int, cause: Cause) -> bool:
    """Leave a cause file; the first one of a process counts. False if there was one already."""
    path = cause_file(run, attempt, cause.role, cause.index)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    temporary.write_text(json.dumps(cause.__dict__, ensure_ascii=False))
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def clear_cause(run: RunDir, attempt: int, role: str, index: int) -> None:
    """Set the cause file of an earlier incarnation aside, so that a new one can leave its own."""
    path = cause_file(run, attempt, role, index)
    number = 1
    while (aside := path.with_name(f"recovered_{number}_{path.name}")).exists():
        number += 1
    if path.exists():
        os.replace(path, aside)


def causes(run: RunDir, attempt: int) -> list[Cause]:
    """Every recorded cause of `attempt`, earliest first."""
    found = []
    records = [e for e in read_events(run, attempt) if e.get("kind") == "failure"]
    for path in run.attempt_logs(attempt).glob("cause_*.json"):
        try:
            records.append(json.loads(path.read_text()))
        except ValueError:
            continue  # torn by a full disk; the events still tell
    for record in records:
        known = {key: record[key] for key in Cause.__dataclass_fields__ if key in record}
        found.append(Cause(**known))
    return sorted(found, key=lambda cause: cause.time)


def first_cause(run: RunDir, attempt: int) -> Cause | None:
    """The earliest cause of the failure of `attempt`, or None.

    Losses of replicas that the run had survived for a while are passed over, and so are the broken
    connections that peers of a dead process report in the same moment, if anything better is there.
    """
    all_causes = causes(run, attempt)
    fatal = [cause for cause in all_causes if cause.role not in REPLICA_ROLES]
    if fatal:
        all_causes = [cause for cause in all_causes if cause.time >= fatal[0].time - REPLICA_WINDOW_S]
    if not all_causes:
        return None
    for cause in all_causes:
        if cause.time > all_causes[0].time + ECHO_WINDOW_S:
            break
        if not _is_echo(cause):
            return cause
    return all_causes[0]


def lost_cause(run: RunDir, attempt: int) -> Cause:
    """The first cause of an attempt that nobody closed: the supervisor's death, or what came before it.

    A lost replica does not end a supervisor, and the echoes are those of its own death.
    """
    fatal = [cause for cause in causes(run, attempt) if cause.role not in REPLICA_ROLES]
    better = [cause for cause in fatal if not _is_echo(cause)]
    return better[0] if better else Cause(time.time(), "supervisor", 0, SILENT_END)


def _is_echo(cause: Cause) -> bool:
    return any(echo in cause.cause.lower() for echo in _ECHOES)
