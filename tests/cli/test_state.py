"""What `status` concludes, for every combination of run directory, lock and Slurm's word."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from hpc_rl.cli._role_lines import RoleLine, role_lines
from hpc_rl.cli._state import checkpoint_problem, judge, run_status
from hpc_rl.cli.status import describe
from hpc_rl.cluster.slurm.states import Component, JobState, State
from hpc_rl.run.attempts import Attempt, JobRecord, close_attempt, open_attempt, record_job
from hpc_rl.run.best import Best, write_best
from hpc_rl.run.events import Cause, EventLog, read_events, write_cause
from hpc_rl.run.paths import RunDir
from hpc_rl.telemetry.metrics import MetricsLog

SLURM_JOB = JobRecord(submitted=100.0, job_id="7", placement="het")
LOCAL_JOB = JobRecord(submitted=100.0, job_id=None, placement="local", pid=1, host="h")


def slurm(state: State, reason: str = "") -> JobState:
    part = Component("7", 0, "x:policy", state, state, reason)
    return JobState("7", state, (part,), "squeue")


def attempt(reason: str | None = None, job_id: str | None = "7", cause: str | None = None) -> Attempt:
    end = None if reason is None else 200.0
    return Attempt(1, 150.0, job_id, pid=1, end=end, reason=reason, first_cause=cause)


@pytest.mark.parametrize(
    ("job", "attempts", "view", "alive", "state"),
    [
        (SLURM_JOB, [], slurm("PENDING"), False, "PENDING"),
        (SLURM_JOB, [attempt()], slurm("RUNNING"), True, "RUNNING"),
        (SLURM_JOB, [attempt("requeue")], slurm("PENDING"), False, "REQUEUED"),
        (SLURM_JOB, [attempt("requeue")], None, False, "REQUEUED"),
        (SLURM_JOB, [attempt("requeue")], slurm("CANCELLED"), False, "CANCELLED"),
        # The job is still being torn down, or has been purged: the closed attempt has the say.
        (SLURM_JOB, [attempt("done")], slurm("RUNNING"), True, "COMPLETED"),
        (SLURM_JOB, [attempt("done")], None, False, "COMPLETED"),
        (SLURM_JOB, [attempt("failed", cause="policy 0: boom")], None, False, "FAILED"),
        (SLURM_JOB, [attempt("stopped")], slurm("FAILED"), False, "CANCELLED"),
        (SLURM_JOB, [attempt("stopped", cause="no progress")], None, False, "FAILED"),
        # SIGTERM may have been a preemption: Slurm's word decides.
        (SLURM_JOB, [attempt("cancelled")], slurm("PENDING"), False, "REQUEUED"),
        (SLURM_JOB, [attempt("cancelled")], slurm("CANCELLED"), False, "CANCELLED"),
        (SLURM_JOB, [attempt("cancelled")], None, False, "CANCELLED"),
        # The supervisor was killed: nobody closed the attempt.
        (SLURM_JOB, [attempt()], slurm("FAILED"), False, "FAILED"),
        (SLURM_JOB, [attempt()], None, False, "FAILED"),
        (SLURM_JOB, [attempt()], None, True, "RUNNING"),
        # A resume: the attempts belong to an earlier job.
        (SLURM_JOB, [attempt("failed", job_id="3")], slurm("PENDING"), False, "PENDING"),
        (SLURM_JOB, [attempt("done", job_id="3")], None, False, "PENDING"),
        (LOCAL_JOB, [attempt(job_id=None)], None, True, "RUNNING"),
        (LOCAL_JOB, [attempt(job_id=None)], None, False, "FAILED"),
        (LOCAL_JOB, [attempt("done", job_id=None)], None, False, "COMPLETED"),
        (LOCAL_JOB, [], None, False, "FAILED"),
        (None, [], None, False, "FAILED"),
    ],
)
def test_judge(
    job: JobRecord | None, attempts: list[Attempt], view: JobState | None, alive: bool, state: str
) -> None:
    assert judge(job, attempts, view, alive=alive)[0] == state


def test_a_cancelled_run_whose_supervisor_was_killed_is_cancelled() -> None:
    assert judge(LOCAL_JOB, [attempt(job_id=None)], None, alive=False, cancel_asked=True)[0] == "CANCELLED"


def test_a_local_resume_does_not_inherit_the_end_of_the_attempt_before() -> None:
    old = Attempt(1, 50.0, None, pid=99, end=60.0, reason="done")  # another supervisor than the latest one
    assert judge(LOCAL_JOB, [old], None, alive=True)[0] == "RUNNING"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir.create(tmp_path, "tiny")
    made.resolved.write_text("name: tiny\n")
    made.plan.write_text(json.dumps({"total_steps": 10}))
    return made


def test_status_of_a_failed_run_needs_only_its_directory(run: RunDir) -> None:
    record_job(run, None, "local", pid=1)
    opened = open_attempt(run)
    run.open_logs(1)
    events = EventLog(run, 1)
    events.append("training", step=0, total_steps=12)
    events.append("step_started", role="policy", index=0)
    events.append("step_exited", role="policy", index=0, code=137)
    write_cause(run, 1, Cause(time.time(), "policy", 0, "out of memory", phase="step"))
    MetricsLog(run.metrics, 1).append(4, {"train/loss": 0.5, "rollout/reward_mean": 0.25})
    close_attempt(run, opened, exit_code=1, reason="failed", cause=None)
    status = run_status(run)
    assert (status.state, status.step, status.total_steps, status.attempt) == ("FAILED", 4, 12, 1)
    assert status.first_cause == "policy 0 (step): out of memory"
    assert status.metrics["rollout/reward_mean"] == 0.25
    assert [(line.role, line.state) for line in status.roles] == [("policy", "killed by SIGKILL")]
    keys = {"run", "run_dir", "job_id", "state", "step", "total_steps", "attempt", "first_cause"}
    assert keys <= set(status.as_json())
    assert status.as_json()["run_dir"] == str(run.root)


@pytest.mark.parametrize(
    ("state", "reason", "said"),
    [
        ("NODE_FAIL", "NodeDown", "; Slurm says NODE_FAIL NodeDown"),
        ("FAILED", "RaisedSignal:9(Killed)", "; Slurm says FAILED RaisedSignal:9(Killed)"),
        (None, "", ""),  # purged from Slurm's memory
    ],
)
def test_a_killed_supervisor_is_named(run: RunDir, state: str | None, reason: str, said: str) -> None:
    record_job(run, "7", "het")
    open_attempt(run, job_id="7")
    run.open_logs(1)
    write_cause(run, 1, Cause(time.time(), "rollout", 0, "the parent process 24088 is gone", phase="idle"))
    part = Component("7", 0, "x:policy", state or "", "FAILED", reason)
    views = {"7": JobState("7", "FAILED", (part,), "squeue")} if state else {}
    status = run_status(run, views=views)
    assert status.state == "FAILED"
    assert status.first_cause == f"supervisor: ended without a word (SIGKILL or node loss){said}"


def test_steps_that_were_rolled_back_are_not_shown(run: RunDir) -> None:
    record_job(run, None, "local", pid=1)
    MetricsLog(run.metrics, 1).append(9, {"train/loss": 0.5})
    again = MetricsLog(run.metrics, 2)
    again.roll_back(5)
    again.append(6, {"train/loss": 0.4})
    assert run_status(run).step == 6


def test_a_lost_replica_stays_lost_after_its_step_ends(run: RunDir) -> None:
    events = EventLog(run, 1)
    events.append("step_started", role="rollout", index=1)
    events.append("replica_lost", index=1, cause="no heartbeat for 40 s")
    events.append("step_exited", role="rollout", index=1, code=143)
    (line,) = role_lines(run, 1, read_events(run), live=False)
    assert (line.state, line.detail) == ("lost", "no heartbeat for 40 s")


KILLED = "ended with signal 9 (SIGKILL)"


@pytest.mark.parametrize("failure_first", [True, False])
def test_a_replica_that_was_restarted_tells_its_loss_and_the_true_cause(
    run: RunDir, failure_first: bool
) -> None:
    record_job(run, None, "local", pid=1)
    opened = open_attempt(run)
    events = EventLog(run, 1)
    events.append("step_launched", role="rollout", index=1, incarnation=1)
    if failure_first:
        events.failure("rollout", KILLED, index=1, exit_code=137)
    events.append("replica_lost", index=1, cause="push of version 118: Connection closed by peer")
    if not failure_first:
        events.failure("rollout", KILLED, index=1, exit_code=137)
    events.append("step_exited", role="rollout", index=1, code=137)
    events.append("step_launched", role="rollout", index=1, incarnation=2)
    events.append("step_started", role="rollout", index=1)
    events.append("redis_restarted", why="killed")
    (line,) = role_lines(run, 1, read_events(run), live=False)
    assert (line.state, line.incarnation, line.lost) == ("running", 2, [KILLED])
    close_attempt(run, opened, exit_code=1, reason="failed", cause="policy 0: boom")
    status = run_status(run)
    assert status.as_json()["roles"][0]["lost"] == [KILLED]
    text = describe(status)
    assert f"incarnation 2, lost once: {KILLED}" in text
    assert "Redis:       restarts in this attempt: 1" in text


def test_the_beat_of_a_gone_incarnation_says_nothing(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = {("rollout", 1): {"phase": "generate", "phase_since": 5.0, "incarnation": 1}}
    monkeypatch.setattr("hpc_rl.cli._role_lines._heartbeats", lambda run, attempt: beats)
    events = EventLog(run, 1)
    events.append("step_launched", role="rollout", index=1, incarnation=2)
    (line,) = role_lines(run, 1, read_events(run), live=True)
    assert line.state == "running"
    beats["rollout", 1]["incarnation"] = 2
    assert role_lines(run, 1, read_events(run), live=True) == [
        RoleLine("rollout", 1, "generate", 5.0, incarnation=2)
    ]


def test_the_time_of_a_role_in_a_run_that_is_over_is_that_since_its_end(run: RunDir) -> None:
    events = EventLog(run, 1)
    events.append("step_started", role="policy", index=0)
    for end in (123.0, None):  # None: the supervisor was killed, nobody knows when
        (line,) = role_lines(run, 1, read_events(run), live=False, ended=True, end=end)
        assert (line.state, line.since) == ("ended with the run", end)


def test_failed_saves_and_damaged_checkpoints_are_in_the_status(run: RunDir) -> None:
    record_job(run, None, "local", pid=1)
    open_attempt(run)
    log = EventLog(run, 1)
    log.append("checkpoint_complete", step=10, seconds=1.0)
    assert run_status(run, views={}).checkpoint_problem is None
    log.append("checkpoint_bad", checkpoint="step_00000010", reason="policy/__0_0.distcp is missing")
    log.append("checkpoint_failed", step=20, error="OSError: No space left on device", in_a_row=1)
    log.append("checkpoint_failed", step=30, error="OSError: No space left on device", in_a_row=2)
    problem = checkpoint_problem(read_events(run), 1)
    assert problem is not None
    assert problem.startswith("saving step 30 FAILED (2 in a row): OSError: No space left on device")
    assert "step_00000010 is damaged (policy/__0_0.distcp is missing)" in problem
    assert problem in describe(run_status(run, views={}))
    log.append("checkpoint_complete", step=40, seconds=1.0)
    assert "FAILED" not in (checkpoint_problem(read_events(run), 1) or "")


def test_the_best_checkpoint_and_the_progress_are_in_the_status(run: RunDir) -> None:
    record_job(run, None, "local", pid=os.getpid())
    open_attempt(run)
    log = MetricsLog(run.metrics, 1)
    for step in (1, 2):
        log.append(step, {"train/loss": 1.0})
    write_best(run, Best(2, "eval/loss", 1.25))
    assert run_status(run, views={}).best is None  # its checkpoint is not there
    run.checkpoint(2).mkdir(parents=True)
    (run.checkpoint(2) / "COMPLETE").write_text("{}")
    status = run_status(run, views={})
    assert status.best == {"step": 2, "metric": "eval/loss", "value": 1.25}
    assert "best:        step 2 (eval/loss 1.25)" in describe(status)
    status.state, status.eta_s = "RUNNING", 720.0
    assert "step:        2/10 (20 %, 12m left)" in describe(status)
