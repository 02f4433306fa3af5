"""The supervisor in the batch step of a real heterogeneous job: steps, cancel, requeue, losses."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from trivial import environment, group, make_run, processes_of

from hpc_rl.bus.client import Bus
from hpc_rl.cluster.devcluster import DevCluster
from hpc_rl.run.attempts import read_attempts
from hpc_rl.run.events import read_events
from hpc_rl.run.paths import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.redis]
LONG = 1_000_000


class Job:
    """A job of two policy tasks on one node and two replicas on two others."""

    def __init__(self, cluster: DevCluster, folder: Path, *, interface: str | None, **wanted: Any) -> None:
        self.cluster = cluster
        site = yaml.safe_load(cluster.site_profile.read_text())
        site["network"] = {"interface": interface}
        site["paths"] = {"local": str(folder)}
        groups = [
            group("policy", 2, component=0, cpus_per_task=1, mem="1000M", partition="policy"),
            group("rollout", 2, component=1, nodes=2, tasks_per_node=1, mem="1000M", partition="rollout"),
        ]
        self.run = make_run(folder, groups=groups, site=site, placement="het", signal_seconds=60)
        common = "--cpus-per-task=1 --mem=1000M --time=10 --requeue --signal=B:USR2@60 --open-mode=append"
        output = f"--output={self.run.logs}/job.log"
        script = self.run.root / "job.sbatch"
        script.write_text(
            "#!/bin/bash\n"
            f"#SBATCH --partition=policy --nodes=1 --ntasks-per-node=2 -J t:policy {common} {output}\n"
            "#SBATCH hetjob\n"
            f"#SBATCH --partition=rollout --nodes=2 --ntasks-per-node=1 -J t:rollout {common} {output}\n"
            f"exec {sys.executable} -m trivial_supervisor {self.run.root}\n"
        )
        answer = cluster.run(
            "sbatch", "--parsable", str(script), cwd=self.run.root, env=environment(**wanted)
        )
        self.job_id = answer.stdout.strip()

    def states(self) -> list[str]:
        answer = self.cluster.run(
            "squeue", "--noheader", "--states=all", "-j", self.job_id, "-o", "%T", check=False
        )
        return answer.stdout.split()

    def until(self, look: Callable[[], Any], what: str, deadline_s: float = 60.0) -> Any:
        deadline = time.monotonic() + deadline_s
        while not (value := look()):
            if time.monotonic() > deadline:
                files = [self.run.logs / "job.log", *sorted(self.run.logs.glob("attempt_*/*.log"))]
                texts = "\n".join(f"--- {f.name}\n{f.read_text()[-2000:]}" for f in files if f.exists())
                raise AssertionError(f"waited {deadline_s} s for {what}; {self.states()}; logs:\n{texts}")
            time.sleep(0.1)
        return value

    def ended(self, deadline_s: float = 90.0) -> list[str]:
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.until(lambda: self.states() and set(self.states()) <= final, "the job to end", deadline_s)
        return self.states()

    def working(self, attempt: int = 1) -> dict[tuple[str, int], dict[str, Any]]:
        """Wait until all four role processes work; their heartbeats."""

        def look() -> Any:
            if not self.run.bus_file(attempt).exists():
                return None
            bus = Bus.connect(self.run.bus_file(attempt), 10.0)
            try:
                beats = bus.heartbeats()
            finally:
                bus.close()
            return beats if sum(beat["phase"] == "work" for beat in beats.values()) == 4 else None

        return self.until(look, "four working processes")


@pytest.fixture
def job(
    devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Job]]:
    for name, value in devcluster.env.items():
        monkeypatch.setenv(name, value)
    jobs: list[Job] = []

    def submit(*, interface: str | None = "lo", **wanted: Any) -> Job:
        jobs.append(Job(devcluster, tmp_path, interface=interface, **wanted))
        return jobs[-1]

    yield submit
    devcluster.cancel_all()
    for one in jobs:
        for pid in processes_of(one.run):
            os.kill(pid, signal.SIGKILL)


def log_names(run: RunDir) -> set[str]:
    return {path.name for path in (run.logs / "latest").iterdir()}


def test_a_het_job_to_its_end(job: Callable[..., Job]) -> None:
    one = job(interface=None, goal=10, end="stop_role")  # the address is found without an interface's name
    assert one.ended() == ["COMPLETED", "COMPLETED"]
    (attempt,) = read_attempts(one.run)
    assert (attempt.reason, attempt.job_id) == ("done", one.job_id)
    assert [nodes.rstrip("0123456789[]-") for nodes in attempt.nodes] == ["policy", "rollout"]
    assert {"policy_0.log", "policy_1.log", "rollout_0.log", "rollout_1.log"} <= log_names(one.run)
    nodes = {line.split()[-1] for line in _registered(one.run)}
    assert len(nodes) == 3, "two ranks on one node, each replica on its own"
    assert "rollout 1 ended with signal 15" in (one.run.logs / "latest/batch.log").read_text()
    assert processes_of(one.run) == []


def _registered(run: RunDir) -> list[str]:
    text = (run.logs / "latest/controller.log").read_text()
    return [line for line in text.splitlines() if "registered" in line]


def test_scancel_ends_everything_within_ten_seconds_and_requeues_nothing(job: Callable[..., Job]) -> None:
    one = job(goal=LONG)
    one.working()
    start = time.monotonic()
    one.cluster.run("scancel", one.job_id)
    one.until(lambda: not processes_of(one.run), "the processes to end", 10.0 - (time.monotonic() - start))
    assert one.ended(10.0) == ["CANCELLED", "CANCELLED"]
    (attempt,) = read_attempts(one.run)
    assert (attempt.reason, attempt.exit_code) == ("cancelled", 143)


def test_walltime_requeues_the_job(job: Callable[..., Job]) -> None:
    one = job(goal=30, pause=0.2)
    one.working()
    one.cluster.run("scancel", "--batch", "--signal=USR2", one.job_id)
    one.until(lambda: set(one.states()) == {"PENDING"}, "the job to be requeued")
    time.sleep(2)
    one.cluster.run("scontrol", "update", f"jobid={one.job_id}", "StartTime=now")
    assert one.ended() == ["COMPLETED", "COMPLETED"]
    attempts = read_attempts(one.run)
    assert [(a.reason, a.restart_count) for a in attempts] == [("requeue", 0), ("done", 1)]
    assert processes_of(one.run) == []


def test_a_killed_replica_is_started_again_beside_the_others(job: Callable[..., Job]) -> None:
    one = job(goal=40, pause=0.1)
    os.kill(one.working()["rollout", 1]["pid"], signal.SIGKILL)
    assert one.ended() == ["COMPLETED", "COMPLETED"]
    launched = [e for e in read_events(one.run) if e["kind"] == "step_launched" and e["role"] == "rollout"]
    assert sorted((e["index"], e["incarnation"]) for e in launched) == [(0, 1), (1, 1), (1, 2)]


def test_a_killed_policy_rank_ends_the_job_with_its_cause(job: Callable[..., Job]) -> None:
    one = job(goal=LONG)
    beats = one.working()
    start = time.monotonic()
    os.kill(beats["policy", 1]["pid"], signal.SIGKILL)
    assert one.ended(60.0) == ["FAILED", "FAILED"]
    assert time.monotonic() - start < 60
    (attempt,) = read_attempts(one.run)
    assert attempt.reason == "failed"
    assert attempt.first_cause is not None
    assert attempt.first_cause.startswith("policy 0: ended with signal")
    assert "task 1" in attempt.first_cause  # srun's own words name the rank
    assert processes_of(one.run) == []


def test_a_killed_supervisor_leaves_nothing(job: Callable[..., Job]) -> None:
    one = job(goal=LONG)
    one.working()
    os.kill(read_attempts(one.run)[0].pid, signal.SIGKILL)
    one.until(lambda: not processes_of(one.run), "the processes to end", 15.0)
    assert one.ended(20.0) == ["FAILED", "FAILED"]
