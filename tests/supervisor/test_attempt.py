"""The failure matrix, with real processes: what ends what, in which time, and with which first cause."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from trivial import Supervised, make_run, processes_of

from hpc_rl.bus.client import Bus
from hpc_rl.run.attempts import close_attempt, open_attempt, read_attempts
from hpc_rl.run.events import read_events
from hpc_rl.run.paths import RunDir
from hpc_rl.run.process import start_ticks

pytestmark = pytest.mark.redis
Start = Callable[..., Supervised]
LONG = 1_000_000


def kinds(run: RunDir) -> list[str]:
    return [event["kind"] for event in read_events(run)]


def beats(run: RunDir, attempt: int = 1) -> dict:
    bus = Bus.connect(run.bus_file(attempt), 10.0)
    try:
        return bus.heartbeats()
    finally:
        bus.close()


def working(one: Supervised, count: int) -> dict:
    """Wait until `count` processes besides the controller work; their heartbeats."""

    def look() -> dict | None:
        if not one.run.bus_file(1).exists():
            return None
        found = beats(one.run)
        ready = [beat for beat in found.values() if beat["phase"] == "work"]
        return found if len(ready) == count else None

    return one.until(look, f"{count} working processes")


def gone_within(run: RunDir, seconds: float) -> float:
    start = time.monotonic()
    while processes_of(run):
        assert time.monotonic() - start < seconds, processes_of(run)
        time.sleep(0.05)
    return time.monotonic() - start


def test_a_run_to_its_end(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=2, rollout=2)
    one = supervised(run, goal=20)
    assert one.wait() == 0, one.logs()
    (attempt,) = read_attempts(run)
    assert (attempt.reason, attempt.exit_code, attempt.first_cause) == ("done", 0, None)
    assert attempt.end is not None
    assert attempt.end > attempt.start
    logs = {path.name for path in (run.logs / "latest").iterdir()}
    assert {"controller.log", "policy_0.log", "policy_1.log", "rollout_0.log", "rollout_1.log"} <= logs
    assert processes_of(run) == []
    assert not run.bus_file(1).exists()
    assert not run.lock.exists()
    assert list(tmp_path.glob("hpc-rl-redis-*")) == []


@pytest.mark.parametrize(("order", "cause"), [("raise", "the disk is full"), ("exit", "exit code 7")])
def test_a_failed_policy_rank_ends_the_attempt(
    tmp_path: Path, supervised: Start, order: str, cause: str
) -> None:
    run = make_run(tmp_path, policy=2, rollout=1)
    (run.control / "policy_1_3").write_text(order)
    one = supervised(run, goal=LONG)
    start = time.monotonic()
    assert one.wait() == 1, one.logs()
    assert time.monotonic() - start < 30
    (attempt,) = read_attempts(run)
    assert attempt.reason == "failed"
    assert attempt.first_cause is not None
    assert attempt.first_cause.startswith("policy ")
    assert cause in attempt.first_cause
    assert processes_of(run) == []


def test_a_failed_replica_is_started_again_and_the_run_goes_on(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=1, rollout=2)
    (run.control / "rollout_1_5").write_text("raise")
    one = supervised(run, goal=20)
    assert one.wait() == 0, one.logs()
    launched = [e for e in read_events(run) if e["kind"] == "step_launched" and e["role"] == "rollout"]
    assert sorted((e["index"], e["incarnation"]) for e in launched) == [(0, 1), (1, 1), (1, 2)]
    assert read_attempts(run)[0].first_cause is None


def test_secrets_are_masked_in_causes(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=1, rollout=0, secrets=["TRIVIAL_SECRET"])
    from hpc_rl.run.secrets import store_secrets

    store_secrets(run, ["TRIVIAL_SECRET"], {"TRIVIAL_SECRET": "hunter2hunter2"})
    (run.control / "policy_0_1").write_text("raise")
    one = supervised(run, goal=LONG)
    assert one.wait() == 1, one.logs()
    cause = json.loads((run.attempt_logs(1) / "cause_policy_0.json").read_text())
    assert "token ***" in cause["cause"]  # so the role had it
    for path in run.root.rglob("*"):
        if path.is_file() and path != run.secrets:
            assert "hunter2hunter2" not in path.read_text(), path


def test_a_crashed_controller_ends_the_attempt(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=2, rollout=1)
    one = supervised(run, goal=LONG)
    os.kill(working(one, 3)["controller", 0]["pid"], signal.SIGKILL)
    assert one.wait(15) == 137, one.logs()
    assert read_attempts(run)[0].first_cause == "controller: ended with signal 9 (SIGKILL)"
    assert processes_of(run) == []


def test_a_killed_redis_is_restarted_and_nothing_is_lost(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=2, rollout=2)
    one = supervised(run, goal=60, pause=0.05)
    working(one, 4)
    (started,) = [event for event in read_events(run) if event["kind"] == "redis_started"]
    os.kill(started["pid"], signal.SIGKILL)
    assert one.wait() == 0, one.logs()  # the controller checks that each answer came exactly once
    assert kinds(run).count("redis_restarted") == 1


def test_a_redis_that_dies_again_and_again_ends_the_attempt(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=1, rollout=1)
    one = supervised(run, goal=LONG)
    working(one, 2)
    start = time.monotonic()
    killed = set()
    while one.process.poll() is None and time.monotonic() - start < 60:
        for event in read_events(run):
            if event["kind"] in ("redis_started", "redis_restarted") and event["pid"] not in killed:
                killed.add(event["pid"])
                os.kill(event["pid"], signal.SIGKILL)
        time.sleep(0.05)
    assert one.wait(10) == 1
    assert time.monotonic() - start < 60
    cause = read_attempts(run)[0].first_cause
    assert cause is not None
    assert cause.startswith("redis: Redis was lost 4 times")
    assert processes_of(run) == []


def test_sigterm_ends_everything_within_ten_seconds(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=2, rollout=2)
    (run.control / "rollout_0_2").write_text("stubborn")
    one = supervised(run, goal=LONG, env={"TRIVIAL_HELPER": "1"})
    working(one, 4)
    one.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert one.wait(10) == 143, one.logs()
    gone_within(run, 10 - (time.monotonic() - start))
    (attempt,) = read_attempts(run)
    assert (attempt.reason, attempt.exit_code) == ("cancelled", 143)


def test_stop_role_ends_a_step_gracefully(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=2, rollout=1)
    one = supervised(run, goal=3, end="stop_role")
    assert one.wait() == 0, one.logs()
    log = (run.logs / "latest/batch.log").read_text()
    assert "policy 0 ended with signal 15 (SIGTERM)" in log
    assert "rollout 0 ended with signal 15 (SIGTERM)" in log
    assert "failure" not in kinds(run)


def test_what_a_role_leaves_behind_dies_with_it(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=1, rollout=0)
    one = supervised(run, goal=3, env={"TRIVIAL_HELPER": "1"})
    assert one.wait() == 0, one.logs()
    (line,) = [li for li in (run.logs / "latest/policy_0.log").read_text().splitlines() if "helper" in li]
    helper = int(line.split("helper ")[1].split()[0])
    gone = time.monotonic() + 5
    while start_ticks(helper) is not None:
        assert time.monotonic() < gone
        time.sleep(0.02)


def test_a_killed_supervisor_takes_its_children_along(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=2, rollout=1)
    one = supervised(run, goal=LONG, env={"TRIVIAL_HELPER": "1"})
    working(one, 3)
    one.process.kill()
    one.process.wait()
    gone_within(run, 10)
    again = supervised(
        run, policy=2, rollout=1, goal=3
    )  # the stale lock and the open attempt are no obstacle
    assert again.wait() == 0, again.logs()
    first, second = read_attempts(run)
    assert (first.reason, second.reason) == ("lost", "done")
    assert first.first_cause == "supervisor: ended without a word (SIGKILL or node loss)"
    assert second.attempt == 2


def test_walltime_resumes_without_slurm_in_the_next_attempt(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=1, rollout=1)
    one = supervised(run, goal=40, pause=0.1)
    working(one, 2)
    one.process.send_signal(signal.SIGUSR2)
    assert one.wait() == 0, one.logs()
    assert [(a.attempt, a.reason) for a in read_attempts(run)] == [(1, "requeue"), (2, "done")]
    assert os.readlink(run.logs / "latest") == "attempt_2"


def test_walltimes_that_bring_no_checkpoint_end_the_run(tmp_path: Path, supervised: Start) -> None:
    """The third in a row; a checkpoint in between counts as progress."""
    run = make_run(tmp_path, policy=1, rollout=0)
    for job in ("1", "2"):
        close_attempt(run, open_attempt(run, job_id=job), exit_code=75, reason="requeue", cause=None)
    run.checkpoint(5).mkdir(parents=True)
    (run.checkpoint(5) / "COMPLETE").touch()
    one = supervised(run, goal=LONG)
    for attempt in (3, 4, 5):
        one.until(lambda: run.bus_file(attempt).exists() and len(beats(run, attempt)) > 1, "a worker", 30.0)  # noqa: B023
        one.process.send_signal(signal.SIGUSR2)
        if attempt < 5:
            one.until(lambda: read_attempts(run)[-1].attempt > attempt, "the next attempt", 30.0)  # noqa: B023
    assert one.wait() == 1, one.logs()
    attempts = read_attempts(run)
    assert [a.reason for a in attempts] == ["requeue"] * 4 + ["failed"]
    assert [a.checkpoint for a in attempts] == [None, None, 5, 5, 5]
    cause = attempts[-1].first_cause
    assert cause is not None
    assert cause.startswith(
        "supervisor: 3 attempts in a row ended at the walltime with no checkpoint after step 5"
    )


def test_one_supervisor_per_run(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=1, rollout=0)
    one = supervised(run, goal=LONG)
    working(one, 1)
    other = supervised(run, goal=1)
    assert other.wait() == 93
    assert other.process.stdout is not None
    words = other.process.stdout.read()
    assert f"the run is held by process {one.process.pid}" in words
    assert "Traceback" not in words
    assert len(read_attempts(run)) == 1


def test_a_missing_redis_is_one_clear_error(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=1, rollout=0, controller={"redis_server": "/no/such/redis-server"})
    assert supervised(run, goal=1).wait() == 1
    cause = read_attempts(run)[0].first_cause
    assert cause is not None
    assert cause.startswith("redis: cluster.controller.redis_server is '/no/such/redis-server'")


def test_no_run_directory_is_one_clear_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hpc_rl.supervisor", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert done.stderr.startswith("hpc-rl supervisor: ")
    assert "is not a run directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_another_user_can_read_nothing_of_the_run(tmp_path: Path, supervised: Start) -> None:
    run = make_run(tmp_path, policy=1, rollout=0)
    one = supervised(run, goal=LONG)
    working(one, 1)
    for folder in (*tmp_path.parents[:-2], tmp_path, run.root.parent):
        folder.chmod(0o755)  # only the run's own modes protect
    script = (
        "import os, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: os.listdir(path) if os.path.isdir(path) else open(path).read(); sys.exit(path)\n"
        "    except PermissionError: pass\n"
    )
    paths = [str(path) for path in (run.root, run.bus_file(1), run.resolved, run.logs, run.lock)]
    paths += [str(path) for path in tmp_path.glob("hpc-rl-redis-*")]
    assert len(paths) == 6
    done = subprocess.run(
        ["setpriv", "--reuid=nobody", "--clear-groups", sys.executable, "-c", script, *paths],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
