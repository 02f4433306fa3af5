"""attempts.jsonl: one entry when an attempt starts, one when it ends; and jobs.jsonl: what was submitted."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from hpc_rl.run import jsonl
from hpc_rl.run.events import lost_cause
from hpc_rl.run.paths import RunDir, RunError


@dataclass
class Attempt:
    """One start of a run's job. `end` is None while it runs (or when nobody was left to write it).

    `reason` is `done`, `requeue`, `stopped` (93), `cancelled` (SIGTERM), `preempted`
    (SIGTERM, and the same job ran again), `failed` or `lost`. `checkpoint` is the step of the newest
    complete checkpoint when it began (None: there was none).
    """

    attempt: int
    start: float
    job_id: str | None = None
    restart_count: int = 0
    nodes: list[str] = field(default_factory=list)
    host: str = ""
    pid: int = 0
    checkpoint: int | None = None
    end: float | None = None
    exit_code: int | None = None
    reason: str | None = None
    first_cause: str | None = None


def read_attempts(run: RunDir) -> list[Attempt]:
    """All attempts in order, each as its latest entry says."""
    attempts: dict[int, Attempt] = {}
    for entry in jsonl.read(run.attempts):
        known: dict[str, Any] = {key: entry[key] for key in Attempt.__dataclass_fields__ if key in entry}
        try:
            attempts[int(entry["attempt"])] = Attempt(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{run.attempts}: an entry is not an attempt ({error}); remove that line"
            ) from error
    return [attempts[number] for number in sorted(attempts)]


def open_attempt(
    run: RunDir, *, job_id: str | None = None, restart_count: int = 0, nodes: list[str] | None = None
) -> Attempt:
    """Begin the next attempt. Earlier ones that never ended are closed as `lost` first."""
    earlier = read_attempts(run)
    for attempt in earlier:
        if attempt.end is None:
            words = str(lost_cause(run, attempt.attempt))
            close_attempt(run, attempt, exit_code=None, reason="lost", cause=words)
        elif attempt.reason == "cancelled" and attempt.job_id == job_id and job_id is not None:
            # scancel, requeue and preemption look alike to the job; that it runs again tells.
            attempt.reason = "preempted"
            jsonl.append(run.attempts, attempt.__dict__)
    number = earlier[-1].attempt + 1 if earlier else 1
    opened = Attempt(
        number, time.time(), job_id, restart_count, nodes or [], socket.gethostname(), os.getpid()
    )
    opened.checkpoint = run.latest_complete()
    jsonl.append(run.attempts, opened.__dict__)
    return opened


def requeues_without_progress(run: RunDir) -> int:
    """How many attempts in a row, up to the newest that has ended, were requeued and began with the
    checkpoint that is the newest still."""
    newest, count = run.latest_complete(), 0
    for attempt in reversed([attempt for attempt in read_attempts(run) if attempt.end is not None]):
        if attempt.reason != "requeue" or attempt.checkpoint != newest:
            break
        count += 1
    return count


def close_attempt(
    run: RunDir, attempt: Attempt, *, exit_code: int | None, reason: str, cause: str | None
) -> Attempt:
    """Write the final entry of `attempt`."""
    attempt.end, attempt.exit_code, attempt.reason, attempt.first_cause = (
        time.time(),
        exit_code,
        reason,
        cause,
    )
    jsonl.append(run.attempts, attempt.__dict__)
    return attempt


@dataclass(frozen=True)
class JobRecord:
    """One submission: `job_id` of Slurm (the leader), or None with the `pid` of a local supervisor."""

    submitted: float
    job_id: str | None
    placement: str
    pid: int | None = None
    host: str = ""
    here: bool = False


def record_job(
    run: RunDir, job_id: str | None, placement: str, *, pid: int | None = None, here: bool = False
) -> JobRecord:
    """Note a submission in jobs.jsonl. `here`: inside an allocation that is not ours to requeue."""
    record = JobRecord(time.time(), job_id, placement, pid, socket.gethostname(), here)
    jsonl.append(run.jobs, record.__dict__)
    return record


def latest_job(run: RunDir) -> JobRecord | None:
    """The newest submission, or None. Raises RunError for an entry that is none."""
    entries = jsonl.read(run.jobs)
    try:
        return JobRecord(**entries[-1]) if entries else None
    except TypeError as error:
        raise RunError(f"{run.jobs}: the last entry is not a job ({error}); remove that line") from error
