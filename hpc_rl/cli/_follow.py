"""Watching a run until it ends: `submit --follow`, `resume --follow` and `cancel --save`."""

from __future__ import annotations

import time
from collections.abc import Callable

from hpc_rl.cli._console import LiveLine, note
from hpc_rl.cli._jobs import JobState, ask_jobs
from hpc_rl.cli._state import ENDED, RunStatus, run_status
from hpc_rl.run.attempts import latest_job, read_attempts
from hpc_rl.run.paths import RunDir
from hpc_rl.telemetry.console import step_line, step_name
from hpc_rl.telemetry.curve import curve
from hpc_rl.telemetry.metrics import read_metrics, series, surviving

POLL_S = 1.0
# The run directory is read every second; Slurm, which others use too, is asked rarely.
ASK_PENDING_S, ASK_RUNNING_S = 5.0, 20.0
LOST_AFTER_S = 15.0


def progress(status: RunStatus) -> str:
    """The live line: the last step's metrics while it runs, why it waits while it does."""
    if status.state == "RUNNING" and status.step is not None and status.metrics:
        return step_line({"step": status.step, **status.metrics}, status.total_steps)
    if status.state == "RUNNING":
        phases = dict.fromkeys(f"{line.role}: {line.state}" for line in status.roles)
        return "RUNNING " + (", ".join(phases) if phases else "starting")
    words = [status.state, step_name(status.step, status.total_steps) if status.step else "", status.reason]
    return " ".join(word for word in words if word)


def watch(run: RunDir, done: Callable[[RunStatus], bool], deadline_s: float | None = None) -> RunStatus:
    """Show progress until `done(status)`; the last status. After `deadline_s` it gives what there is."""
    line, views, asked, lost_since = LiveLine(), dict[str, JobState](), float("-inf"), None
    end = None if deadline_s is None else time.monotonic() + deadline_s
    try:
        while True:
            now = time.monotonic()
            job = latest_job(run)
            every = ASK_RUNNING_S if any(v.state == "RUNNING" for v in views.values()) else ASK_PENDING_S
            if job is not None and job.job_id and now - asked >= every:
                views, asked = ask_jobs([job.job_id]), now
            status = run_status(run, views=views)
            line.show(progress(status))
            # A supervisor that was just started holds no lock yet: believe FAILED only after a while.
            silent = status.state == "FAILED" and status.first_cause is None and not _closed(run)
            lost_since = (lost_since or now) if silent else None
            if done(status) and (lost_since is None or now - lost_since > LOST_AFTER_S):
                return status
            if end is not None and now > end:
                return status
            time.sleep(POLL_S)
    finally:
        line.end()


def _closed(run: RunDir) -> bool:
    attempts = read_attempts(run)
    return bool(attempts) and attempts[-1].end is not None


def follow(run: RunDir) -> int:
    """Follow `run` to its end: the run's exit code, or 0 when Ctrl-C detaches from it."""
    try:
        status = watch(run, lambda status: status.state in ENDED)
    except KeyboardInterrupt:
        note("detached; the run goes on")
        note(f"follow it: hpc-rl logs {run.root} -f")
        note(f"end it:    hpc-rl cancel {run.root}")
        return 0
    show_end(run, status)
    return exit_code(run, status)


def show_end(run: RunDir, status: RunStatus) -> None:
    """The end of a run: its held-out accuracy as a curve, its state, and the cause if it failed."""
    points = series(surviving(read_metrics(run.metrics)), "eval/accuracy")
    if len(points) > 1:
        top = max(1.0, *(value for _, value in points))  # a reward may be more than 1
        print(curve(points, title="eval/accuracy", low=0, high=top))
    print(f"{status.state}: {run.root}")
    if status.first_cause and status.state != "COMPLETED":
        print(f"first cause: {status.first_cause}")
        print(f"logs: {status.logs}")


def exit_code(run: RunDir, status: RunStatus) -> int:
    """0 for COMPLETED, else the code of the last attempt, or 1 where it left none."""
    if status.state == "COMPLETED":
        return 0
    attempts = read_attempts(run)
    return (attempts[-1].exit_code if attempts else None) or 1
