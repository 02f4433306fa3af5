"""Whole runs on a real Slurm: heterogeneous jobs with different partitions, losses, cancel."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.e2e import tiny
from tests.e2e.harness import Run
from tests.e2e.test_scoring import make_reward_model

pytestmark = [pytest.mark.slurm, pytest.mark.torch, pytest.mark.slow]


def submit(devcluster, recipe: Path, *overrides: str) -> Run:  # type: ignore[no-untyped-def]
    return Run.submit(recipe, *overrides, "--site", str(devcluster.site_profile), env=dict(devcluster.env))


def het(workspace: Path, **changes: object) -> Path:
    """2 policy tasks (FSDP2) and 2 replicas, each on a node of its own, in different partitions."""
    base = {
        "policy": {"parallel": {"dp_shard": 2}, "steps": 6},
        "rollout": {"replicas": 2},
        "cluster": {"placement": "het", "policy": {"nodes": 2}, "rollout": {"nodes": 2}},
    }
    return tiny.rl_recipe(workspace, **tiny.merge(base, changes))


def registered(run: Run, role: str, index: int) -> int | None:
    """The pid of a role process, from the controller's log."""
    log = run.root / "logs" / "latest" / "controller_0.log"
    if not log.is_file():
        log = run.root / "logs" / "latest" / "controller.log"
    found = None
    for line in log.read_text().splitlines() if log.is_file() else []:
        if f"{role} {index} registered (pid " in line:
            found = int(line.split("(pid ")[1].split()[0])
    return found


def test_a_het_job_of_three_components_runs_to_completed_and_is_seen_in_its_partitions(
    accounting_devcluster, workspace: Path
) -> None:  # type: ignore[no-untyped-def]
    """The third is a reward model on the CPU node, which the replicas of the second ask."""
    cluster = accounting_devcluster
    model = {"name": "model", "path": str(make_reward_model(workspace / "reward")), "dtype": "float32"}
    reward = {"partition": cluster.spec.partition_of("controller")}
    run = submit(
        cluster,
        het(workspace, reward=[{"name": "digits"}, {**model, "weight": 0.1}], cluster={"reward": reward}),
    )
    job = run.status()["job_id"]
    run.wait_for_step(1)
    shown = cluster.run("squeue", "-h", "-o", "%i %j %P %T").stdout
    mine = [line.split() for line in shown.splitlines() if line.startswith(f"{job}+")]
    assert sorted((line[0], line[1], line[3]) for line in mine) == [
        (f"{job}+0", "tiny-grpo:policy", "RUNNING"),
        (f"{job}+1", "tiny-grpo:rollout", "RUNNING"),
        (f"{job}+2", "tiny-grpo:reward", "RUNNING"),
    ]
    partitions = {line[0]: line[2] for line in mine}
    assert len(set(partitions.values())) == 3
    status = run.complete()
    assert status["step"] == 6
    trained = sorted(o for entry in run.ledger() for o in entry["trained"])
    assert trained == list(range(12))
    assert accounted(cluster, job) == [
        [f"{job}+0", "tiny-grpo:policy", partitions[f"{job}+0"], "COMPLETED"],
        [f"{job}+1", "tiny-grpo:rollout", partitions[f"{job}+1"], "COMPLETED"],
        [f"{job}+2", "tiny-grpo:reward", partitions[f"{job}+2"], "COMPLETED"],
    ]
    assert all("reward/model" in row and row["rollout/unscored"] == 0.0 for row in run.metrics())


def accounted(cluster, job: str) -> list[list[str]]:  # type: ignore[no-untyped-def]
    """What `sacct` says of the components, once slurmdbd was told of their end."""
    deadline = time.monotonic() + 20
    while True:
        asked = ("sacct", "-n", "-X", "-P", "-j", job, "-o", "JobID,JobName,Partition,State")
        rows = [line.split("|") for line in cluster.run(*asked).stdout.splitlines()]
        if all(row[3] not in ("RUNNING", "PENDING") for row in rows) or time.monotonic() > deadline:
            return sorted(rows)
        time.sleep(0.5)


def test_cancel_ends_all_components_within_ten_seconds(devcluster, workspace: Path) -> None:  # type: ignore[no-untyped-def]
    run = submit(devcluster, het(workspace, policy={"steps": 500}))
    job = run.status()["job_id"]
    run.wait_for_step(1)
    pids = [registered(run, "policy", 0), registered(run, "policy", 1), registered(run, "rollout", 0)]
    assert all(pids)
    comments = lambda: devcluster.run("squeue", "-h", "-j", job, "-o", "%k").stdout  # noqa: E731
    run.wait_for(lambda: "/500 reward=" in comments(), 30, "squeue as a dashboard")
    run.cancel()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = devcluster.run("squeue", "-h", "-t", "all", "-o", "%i %T").stdout.splitlines()
        states = {line.split()[1] for line in left if line.startswith(f"{job}+")}
        if states <= {"CANCELLED"} and not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            break
        time.sleep(0.2)
    else:
        pytest.fail(f"still there: {states}, {[p for p in pids if os.path.exists(f'/proc/{p}')]}")
    assert run.wait()["state"] == "CANCELLED"


def test_killing_one_replica_is_reported_and_the_run_goes_on(devcluster, workspace: Path) -> None:  # type: ignore[no-untyped-def]
    run = submit(devcluster, het(workspace, policy={"steps": 30}))
    run.wait_for_step(2)
    pid = registered(run, "rollout", 1)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    killed = time.time()
    run.wait_for(lambda: bool(run.events("replica_lost")), 60, "the loss is reported")
    assert run.events("replica_lost")[0]["index"] == 1
    assert run.events("replica_lost")[0]["time"] - killed < 60
    run.complete()
    trained = [o for entry in run.ledger() for o in entry["trained"]]
    assert sorted(trained) == list(range(60)), "its prompts were redone, none twice"


@pytest.mark.parametrize("victim", ["policy", "redis"])
def test_any_other_loss_ends_the_attempt_with_the_first_cause(
    devcluster, workspace: Path, victim: str
) -> None:  # type: ignore[no-untyped-def]
    run = submit(devcluster, het(workspace, policy={"steps": 500}))
    run.wait_for_step(2)
    killed = time.monotonic()
    if victim == "policy":
        os.kill(registered(run, "policy", 1) or 0, signal.SIGKILL)
        words = "policy"
    else:
        words = "edis"
        deadline = time.monotonic() + 50
        while run.status()["state"] == "RUNNING" and time.monotonic() < deadline:
            for event in run.events("redis_started") + run.events("redis_restarted"):
                if os.path.exists(f"/proc/{event['pid']}"):
                    os.kill(event["pid"], signal.SIGKILL)  # until its restarts are used up
            time.sleep(0.5)
    status = run.wait(60)
    assert status["state"] == "FAILED"
    assert time.monotonic() - killed < 60
    assert words in json.dumps(status["first_cause"])


def test_submit_here_runs_inside_an_allocation(devcluster, workspace: Path) -> None:  # type: ignore[no-untyped-def]
    """`salloc`, then `hpc-rl submit --here --follow`: the allocation's node is used, nothing is queued."""
    recipe = tiny.sft_recipe(workspace, policy={"steps": 3}, cluster={"placement": None})
    submit = [sys.executable, "-m", "hpc_rl.cli.main", "submit", str(recipe), "--here", "--follow"]
    site = ["--site", str(devcluster.site_profile)]
    allocate = [
        "salloc",
        "--partition",
        devcluster.spec.partition_of("policy"),
        "--nodes",
        "1",
        "--ntasks",
        "1",
    ]
    done = devcluster.run(
        *allocate, "--cpus-per-task", "2", *submit, *site, timeout_s=200, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (root,) = (workspace / "runs" / "tiny-sft").iterdir()
    run = Run(root, dict(devcluster.env))
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert run.status()["state"] == "COMPLETED"
    assert (root / "safetensors" / "final" / "model.safetensors").is_file()
