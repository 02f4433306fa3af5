"""What Slurm does to a batch step, its `srun` clients and their tasks: what the supervisor is built on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.cluster.devcluster import DevCluster
from tests.devcluster.hetjob import HetJob, alive, kill9

pytestmark = pytest.mark.slurm

Submit = Callable[..., HetJob]


def _pid(job: HetJob, who: str) -> int:
    pid = job.events(who, "start")[-1]["pid"]
    assert isinstance(pid, int)
    return pid


def _signals(job: HetJob, who: str) -> list[str]:
    return [event["signal"] for event in job.events(who, "signal") if event["signal"] != "SIGCONT"]


def _exit_code(job: HetJob, group: int) -> int | None:
    codes = [event["code"] for event in job.events("supervisor", "step_exit") if event["group"] == group]
    return codes[-1] if codes else None


def test_each_step_sees_the_leaders_id_and_its_own_partition(het_job: Submit) -> None:
    job = het_job(obedient=True)
    batch = job.events("supervisor", "start")[0]["env"]
    assert batch["SLURM_HET_SIZE"] == "2"
    assert batch["SLURM_JOB_ID"] == job.job_id
    assert "SLURM_RESTART_COUNT" not in batch
    assert batch["SLURM_CONF"] == job.cluster.env["SLURM_CONF"]
    seen = {}
    for event in job.events("task", "start"):
        env = event["env"]
        assert env["SLURM_JOB_ID"] == job.job_id
        assert "SLURM_HET_JOB_OFFSET" not in env
        seen[event["who"]] = (env["SLURM_JOB_PARTITION"], env["SLURM_NTASKS"], env["SLURM_JOB_NAME"])
    assert seen == {
        "task0.0": ("policy", "2", "t:policy"),
        "task0.1": ("policy", "2", "t:policy"),
        "task1.0": ("rollout", "1", "t:rollout"),
    }


def test_kill_9_of_the_batch_process_ends_every_component_and_is_not_requeued(het_job: Submit) -> None:
    job = het_job(obedient=True)
    kill9(_pid(job, "supervisor"))
    assert job.ended(20) == ["FAILED", "FAILED"]
    assert job.show("Restarts") == ["0", "0"]
    assert job.show("ExitCode") == ["0:9", "0:9"]
    assert _signals(job, "task") == ["SIGTERM"] * 3
    assert not any(job.tasks_alive().values())
    # Without cgroups a child of the batch process in a session of its own outlives the job.
    assert alive(job.events("supervisor", "child")[0]["child"])


def test_scancel_terms_batch_step_and_tasks_at_once_and_kills_after_kill_wait(het_job: Submit) -> None:
    job = het_job()
    begun = time.time()
    job.cluster.run("scancel", job.job_id)
    assert job.ended(20) == ["CANCELLED", "CANCELLED"]
    assert time.time() - begun >= job.cluster.spec.kill_wait_s - 1
    assert _signals(job, "supervisor") == ["SIGTERM"]
    assert [_signals(job, who) for who in ("task0.0", "task0.1", "task1.0")] == [["SIGTERM"]] * 3
    assert job.show("Restarts") == ["0", "0"]
    assert not any(job.tasks_alive().values())


def test_a_job_whose_processes_end_at_sigterm_is_cancelled_at_once(het_job: Submit) -> None:
    job = het_job(obedient=True)
    begun = time.time()
    job.cluster.run("scancel", job.job_id)
    assert job.ended(10) == ["CANCELLED", "CANCELLED"]
    assert time.time() - begun < job.cluster.spec.kill_wait_s


def test_usr2_with_b_reaches_the_batch_process_alone(het_job: Submit) -> None:
    job = het_job(obedient=True)
    job.cluster.run("scancel", "--signal=USR2", "--batch", job.job_id)
    job.wait(lambda: _signals(job, "supervisor") == ["SIGUSR2"], "USR2 in the batch process")
    job.cluster.run("scancel", "--signal=USR1", job.job_id)
    job.wait(lambda: _signals(job, "task") == ["SIGUSR1"] * 3, "USR1 in every task")
    assert _signals(job, "supervisor") == ["SIGUSR2"]


@pytest.mark.slow
def test_requeue_keeps_the_id_and_counts_the_restart(het_job: Submit) -> None:
    job = het_job(obedient=True)
    (job.folder / "requeue").touch()  # from inside, as the supervisor does it
    job.started(attempt=2)
    first, second = (event["env"] for event in job.events("supervisor", "start"))
    assert first["SLURM_JOB_ID"] == second["SLURM_JOB_ID"] == job.job_id
    assert second["SLURM_RESTART_COUNT"] == "1"
    assert job.events("supervisor", "requeue")[0]["code"] == 0
    assert "SIGTERM" in _signals(job, "supervisor"), "a requeue looks like scancel to the batch process"


def test_start_time_now_skips_the_wait_after_a_requeue(het_job: Submit) -> None:
    job = het_job(obedient=True)
    job.cluster.run("scontrol", "requeue", job.job_id)
    begun = time.monotonic()
    job.poke_after_requeue()
    job.started(attempt=2)
    assert time.monotonic() - begun < 10


def test_the_batch_scripts_exit_code_is_the_jobs_and_requeues_nothing(het_job: Submit) -> None:
    job = het_job(obedient=True)
    (job.folder / "exit").write_text("75")
    assert job.ended() == ["FAILED", "FAILED"]
    assert job.show("ExitCode") == ["75:0", "75:0"]
    assert job.show("Restarts") == ["0", "0"]
    assert _signals(job, "task") == ["SIGTERM"] * 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_an_srun_client_ends_its_step_alone_without_sigterm(
    het_job: Submit, number: signal.Signals
) -> None:
    job = het_job()
    client = next(e["srun"] for e in job.events("supervisor", "srun") if e["group"] == 1)
    os.kill(client, number)
    job.wait(lambda: not job.tasks_alive()["task1.0"], "the task of the step to end", 10)
    job.wait(lambda: _exit_code(job, 1) is not None, "srun to be collected", 10)
    assert _exit_code(job, 1) == {signal.SIGKILL: -9, signal.SIGTERM: 137}[number]
    assert _signals(job, "task1") == []
    assert job.tasks_alive() == {"task0.0": True, "task0.1": True, "task1.0": False}
    assert job.states() == ["RUNNING", "RUNNING"]


def test_srun_returns_the_tasks_exit_code_and_the_other_component_goes_on(het_job: Submit) -> None:
    job = het_job(obedient=True)
    (job.folder / "task1").write_text("3")
    job.wait(lambda: _exit_code(job, 1) == 3, "srun to return 3", 10)
    assert job.tasks_alive() == {"task0.0": True, "task0.1": True, "task1.0": False}
    kill9(_pid(job, "task0.1"))
    job.wait(lambda: _exit_code(job, 0) is not None, "srun of the policy step to end", 15)
    assert _exit_code(job, 0) == 137 or _exit_code(job, 0) == 143
    assert _signals(job, "task0.0") == ["SIGTERM"], "--kill-on-bad-exit ends the other tasks of the step"
    assert job.states() == ["RUNNING", "RUNNING"]


@pytest.mark.slow
def test_a_lost_node_requeues_the_whole_job_and_its_srun_returns_zero(het_job: Submit) -> None:
    job = het_job(obedient=True)
    cluster = job.cluster
    node = job.events("task1", "start")[0]["env"]["SLURMD_NODENAME"]
    old = _pid(job, "task1")
    cluster.stop_daemon(f"slurmd-{node}")
    try:
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        job.wait(lambda: _exit_code(job, 1) is not None, "srun of the lost node to return")
        assert _exit_code(job, 1) == 0, "never take srun's code alone for success"
    finally:
        cluster.start_daemon(f"slurmd-{node}")
    job.started(attempt=2)
    assert job.show("Restarts") == ["1", "1"]
    cluster.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    job.wait(lambda: not alive(old), "the returning slurmd to end the stale task")


@pytest.mark.slow
def test_preemption_sends_usr2_and_requeues_the_whole_job(het_job: Submit) -> None:
    job = het_job(obedient=True, options=("--signal=B:USR2@60",))
    urgent = ["--partition=urgent", "--nodes=2", "--nodelist=rollout1,rollout2", "--exclusive"]
    job.cluster.run("sbatch", *urgent, "--output=/dev/null", "--wrap=sleep 2")
    job.started(attempt=2)
    # Without a GraceTime SIGTERM follows USR2 at once: there is no time to save.
    assert _signals(job, "supervisor") == ["SIGUSR2", "SIGTERM"]
    assert job.events("supervisor", "start")[1]["env"]["SLURM_RESTART_COUNT"] == "1"


_GPU_STEPS = """\
#!/bin/bash
#SBATCH --partition=policy --nodes=1 --ntasks=1 --mem=1G
#SBATCH hetjob
#SBATCH --partition=rollout --nodes=1 --ntasks=4 --cpus-per-task=2 --gres=gpu:4 --mem=8G
for k in 0 1 2 3; do
  srun --het-group=1 --exact --nodes=1 --ntasks=1 --cpus-per-task=2 --gres=gpu:1 --mem=2G \\
    bash -c 'echo $(date +%s.%N) $CUDA_VISIBLE_DEVICES; sleep 4' &
done
wait
"""


def test_exact_steps_start_together_and_get_disjoint_gpus(devcluster: DevCluster, tmp_path: Path) -> None:
    script, out = tmp_path / "gpu.sbatch", tmp_path / "out"
    script.write_text(_GPU_STEPS)
    devcluster.run("sbatch", "--wait", f"--output={out}", str(script), timeout_s=60, cwd=tmp_path)
    lines = [line.split() for line in out.read_text().splitlines()]
    assert sorted(gpu for _, gpu in lines) == ["0", "1", "2", "3"]
    starts = [float(start) for start, _ in lines]
    assert max(starts) - min(starts) < 4, "no step waited for another one to end"
