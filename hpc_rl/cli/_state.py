"""What a run is doing, worked out from its directory and, where it answers, from Slurm.

Truth goes in this order: an attempt that was closed says how it ended; a job that Slurm knows says
whether it waits or runs; a live holder of the run lock means that a supervisor is at work. With Slurm
away or the job purged from its memory, the run directory alone still gives an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc_rl.cli._jobs import JobState, ask_jobs
from hpc_rl.cli._role_lines import RoleLine, role_lines
from hpc_rl.cli._tail import last_lines
from hpc_rl.cli._uploads import UploadLine, export_problem, upload_lines
from hpc_rl.cluster.local.start import local_state
from hpc_rl.run.attempts import Attempt, JobRecord, latest_job, read_attempts
from hpc_rl.run.best import read_best
from hpc_rl.run.events import first_cause, lost_cause, read_events
from hpc_rl.run.lock import live_holder
from hpc_rl.run.paths import RunDir
from hpc_rl.telemetry.console import eta_of_rows
from hpc_rl.telemetry.metrics import latest, surviving, tail_rows
from hpc_rl.telemetry.wandb import read_link

ENDED = ("COMPLETED", "FAILED", "CANCELLED")
_BY_REASON = {"done": "COMPLETED", "cancelled": "CANCELLED", "requeue": "REQUEUED", "failed": "FAILED"}


@dataclass
class RunStatus:
    """The answer of `status`; `--json` prints it as an object with these keys."""

    run: str
    run_dir: str
    job_id: str | None
    state: str
    step: int | None
    total_steps: int | None
    attempt: int
    first_cause: str | None
    reason: str = ""
    placement: str = ""
    submitted: float | None = None
    eta_s: float | None = None  # until the last step, while it runs
    checkpoint: int | None = None
    best: dict[str, Any] | None = None  # step, metric and value of the best checkpoint by validation
    checkpoint_problem: str | None = None  # saves that failed since the last good one, damaged checkpoints
    export_problem: str | None = None
    uploads: list[UploadLine] = field(default_factory=list)
    wandb: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    roles: list[RoleLine] = field(default_factory=list)
    components: list[dict[str, Any]] = field(default_factory=list)
    redis_restarts: int = 0  # in the latest attempt
    logs: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_status(run: RunDir, *, views: Mapping[str, JobState] | None = None, live: bool = True) -> RunStatus:
    """The status of `run`. `views` are Slurm's answers if they are known already.

    `live` also asks the run's bus (when it runs) what each process does.
    """
    job, attempts = latest_job(run), read_attempts(run)
    view = None
    if job is not None and job.job_id and not job.here:  # the allocation of --here outlives the run
        view = (ask_jobs([job.job_id]) if views is None else views).get(job.job_id)
    # A supervisor that was just started here holds no lock yet, but its process is there.
    alive = live_holder(run) is not None or local_state(run) == "RUNNING"
    events = read_events(run)
    asked = job is not None and any(e.get("kind") == "cancel" and e["time"] > job.submitted for e in events)
    state, reason = judge(job, attempts, view, alive=alive, cancel_asked=asked)
    rows = surviving(tail_rows(run.metrics, 50))
    number = attempts[-1].attempt if attempts else 0
    total = total_steps(run, events, since=job.submitted if job else 0.0)
    best = read_best(run)
    return RunStatus(
        run=run.recorded_name(),
        run_dir=str(run.root),
        job_id=job.job_id if job else None,
        state=state,
        step=rows[-1]["step"] if rows else run.latest_complete(),
        total_steps=total,
        attempt=number,
        first_cause=_cause(run, attempts, state, view),
        reason=reason,
        placement=job.placement if job else "",
        submitted=job.submitted if job else None,
        eta_s=eta_of_rows(rows, total) if state == "RUNNING" else None,
        checkpoint=run.latest_complete(),
        best=asdict(best) if best is not None else None,
        checkpoint_problem=checkpoint_problem(events, number),
        export_problem=export_problem(events),
        uploads=upload_lines(events),
        wandb=read_link(run.wandb),
        metrics=latest(rows),
        roles=role_lines(
            run,
            number,
            events,
            live=live and state == "RUNNING",
            ended=state in ENDED,
            end=attempts[-1].end,
        )
        if number
        else [],
        redis_restarts=sum(e.get("kind") == "redis_restarted" and e.get("attempt") == number for e in events),
        components=[asdict(component) for component in view.components] if view else [],
        logs=str(run.attempt_logs(number) if number else run.logs),
    )


def judge(
    job: JobRecord | None,
    attempts: Sequence[Attempt],
    view: JobState | None,
    *,
    alive: bool,
    cancel_asked: bool = False,
) -> tuple[str, str]:
    """(state, reason) of a run; pure, so that every combination can be tested.

    `view` is what Slurm says of the latest job (None: it cannot be asked or has forgotten it);
    `alive` whether a supervisor holds the run, `cancel_asked` whether `hpc-rl cancel` was used on it.
    """
    last = attempts[-1] if attempts else None
    if last is not None and job is not None and not _belongs(last, job):
        last = None  # an attempt of an earlier submission says nothing of this one
    if (
        last is not None
        and last.end is not None
        and last.reason in ("done", "failed", "stopped", "cancelled")
    ):
        if last.reason == "stopped":
            return (
                ("FAILED", "never to be requeued") if last.first_cause else ("CANCELLED", "saved and stopped")
            )
        if last.reason != "cancelled" or view is None or view.final:
            return _BY_REASON[last.reason], ""
    if view is not None and not view.final:
        if view.state == "PENDING" and last is not None:
            return "REQUEUED", view.why  # it has run before, whatever Slurm calls it now
        return view.state, view.why
    if alive:
        return "RUNNING", ""
    if cancel_asked:
        return "CANCELLED", ""
    return _ended_without_slurm(job, last, view)


def _belongs(attempt: Attempt, job: JobRecord) -> bool:
    return attempt.pid == job.pid if job.pid is not None else attempt.job_id == job.job_id


def _ended_without_slurm(
    job: JobRecord | None, last: Attempt | None, view: JobState | None
) -> tuple[str, str]:
    if view is not None:  # over, and nobody wrote the attempt's end
        return view.state, view.why
    if last is not None:
        if last.end is not None:
            return _BY_REASON.get(last.reason or "", "FAILED"), ""
        return "FAILED", "the supervisor ended without a word (node loss or SIGKILL)"
    if job is None:
        return "FAILED", "it was never submitted"
    if job.job_id is None:
        return "FAILED", "its supervisor did not start; see logs/"
    return "PENDING", "Slurm cannot be asked from here, and no attempt has started"


def checkpoint_problem(events: Sequence[Mapping[str, Any]], attempt: int) -> str | None:
    """What is wrong with the checkpoints, newest first; None if the last save went well and all are whole."""
    problems = []
    for event in reversed(events):
        kind = event.get("kind")
        if kind == "checkpoint_complete":
            break
        if kind == "checkpoint_failed":
            problems.append(
                f"saving step {event['step']} FAILED ({event['in_a_row']} in a row): {event['error']}"
            )
            break
        if kind == "checkpoint_skipped":
            problems.append(f"step {event['step']} was not saved: step {event['writing']} was in writing")
            break
    problems += [
        f"{event['checkpoint']} is damaged ({event['reason']}) and was passed over"
        for event in reversed(events)
        if event.get("kind") == "checkpoint_bad" and event.get("attempt") == attempt
    ]
    return "; ".join(problems) or None


def _cause(run: RunDir, attempts: Sequence[Attempt], state: str, view: JobState | None) -> str | None:
    if state == "COMPLETED":
        return None
    if not attempts:
        return _last_words(run) if state == "FAILED" else None
    last = attempts[-1]
    if last.first_cause:
        return last.first_cause
    if state == "FAILED" and last.end is None:
        return str(lost_cause(run, last.attempt)) + slurm_words(view)
    if state == "FAILED" or last.end is not None:
        cause = first_cause(run, last.attempt)
        return str(cause) if cause else None
    return None


def slurm_words(view: JobState | None) -> str:
    """What Slurm itself says of a job that failed (NODE_FAIL, OUT_OF_MEMORY, exit 0:9); "" if nothing."""
    if view is None:
        return ""
    said: list[str] = []
    for part in view.components:
        if part.state != "FAILED":
            continue
        parts = [part.slurm_state]
        parts += [part.reason] if part.reason not in ("", "None") else []
        parts += [f"exit {part.exit_code}"] if part.exit_code not in ("", "0:0") else []
        said.append(" ".join(parts))
    return f"; Slurm says {', '.join(dict.fromkeys(said))}" if said else ""


def _last_words(run: RunDir) -> str | None:
    """What a supervisor that opened no attempt said last, in the log of its start."""
    for path in (run.logs / "job.log", run.logs / "latest" / "batch.log"):
        if path.is_file() and (lines := last_lines(path, 1)[0]):
            return lines[0].strip()
    return None


def total_steps(run: RunDir, events: Sequence[Mapping[str, Any]], *, since: float) -> int | None:
    """As the controller counted it, else as planned (None where epochs need the data counted first).

    Only `since` the latest submission: a resume may have changed it.
    """
    for event in reversed(events):
        if event.get("kind") == "training" and event.get("total_steps") and event["time"] >= since:
            return int(event["total_steps"])
    try:
        plan = json.loads(run.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged: `resume` says so, the state is known without it
        return None
    planned = plan.get("total_steps") if isinstance(plan, dict) else None
    return planned if isinstance(planned, int) and planned else None
