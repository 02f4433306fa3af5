"""The same scripts, steps and states on a real Slurm: 13 nodes, three partitions, fake GPUs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm_cases import CASES, CLUSTER, FOLDER, HET, build, script_of

from hpc_rl.cluster.devcluster import DevCluster
from hpc_rl.cluster.slurm import watcher
from hpc_rl.cluster.slurm.commands import SlurmError
from hpc_rl.cluster.slurm.executor import HetSlurmExecutor
from hpc_rl.cluster.slurm.script import JobScript
from hpc_rl.cluster.slurm.site_init import draft_site
from hpc_rl.cluster.slurm.states import SACCT_FORMAT, parse_sacct
from hpc_rl.cluster.slurm.task import SupervisorTask
from hpc_rl.cluster.slurm.testonly import try_submit
from hpc_rl.plan import write_plan
from hpc_rl.plan.site import Site
from tests.conftest import up_and_down

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
SFT: dict[str, Any] = {
    "kind": "sft",
    "algorithm": {},
    "reward": [],
    "rollout": None,
    "policy": {"parallel": {"dp_shard": 1}},
}
SECRET = "hf_aVerySecretValue"


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    yield from up_and_down("slurm", CLUSTER)


@pytest.fixture(autouse=True)
def _environment(cluster: DevCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(HERE))  # the job finds slurm_payload there
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")  # would override every component


class Job:
    """One submitted test job and its run directory."""

    def __init__(
        self, root: Path, recipe: dict[str, Any], site: dict[str, Any], entry: str = "slurm_payload:supervise"
    ) -> None:
        root.mkdir()
        here = {"python": sys.executable, "paths": {"hf_home": None, "local": str(root)}, "network": {}}
        made, plan, profile = build(recipe, {**site, **here, "network": {"interface": "lo"}})
        write_plan(plan, root / "plan.json")
        (root / "recipe.json").write_text(made.model_dump_json(), encoding="utf-8")
        self.root, self.plan = root, plan
        self.script = JobScript.of(made, plan, profile, run_dir=root, log=root / "job.log")
        self.submitted = HetSlurmExecutor(root / "submitit", self.script).submit(
            SupervisorTask(str(root), entry)
        )
        self.id = self.submitted.job_id

    def events(self, kind: str) -> list[dict[str, Any]]:
        file = self.root / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def logs(self, role: str) -> list[list[str]]:
        """What the tasks of a role printed in their first attempt, by rank or replica."""
        files = sorted(self.root.glob(f"{role}_*.log"), key=lambda path: int(path.stem.split("_")[1]))
        texts = [path.read_text().splitlines() for path in files]
        return [lines[0].split("|") for lines in texts if lines]

    def state(self) -> str | None:
        job = watcher.job_state(self.id)
        return job.state if job else None


def until(condition: Callable[[], object], seconds: float = 60.0, what: Callable[[], object] = str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what()}"
        time.sleep(0.2)


@pytest.mark.parametrize("name", HET)
def test_slurm_takes_the_golden_script(name: str) -> None:
    trial = try_submit(script_of(name), FOLDER)
    assert "gpu1" in trial.nodes or "gpu[1" in trial.nodes
    assert trial.start


def test_slurm_takes_the_golden_scripts_of_one_component() -> None:
    for name in sorted(set(CASES) - set(HET)):
        assert try_submit(script_of(name), FOLDER).start


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"cluster": {"rollout": {"partition": "nope"}}}, "to one of: gpu, gpu-small, cpu"),
        ({"cluster": {"rollout": {"constraint": "h200"}}}, "(?i)feature"),
        ({"policy": {"parallel": {"dp_shard": 128}}, "cluster": {"policy": {"nodes": 16}}}, "can ever give"),
    ],
)
def test_what_can_never_start_is_refused_before_it_is_queued(recipe: dict[str, Any], words: str) -> None:
    recipe_made, plan, site = build(recipe, {})
    script = JobScript.of(recipe_made, plan, site, run_dir=FOLDER.parent, log=FOLDER / "log")
    with pytest.raises(SlurmError, match=words):
        try_submit(script, FOLDER)


def test_a_drafted_profile_describes_this_cluster() -> None:
    import yaml

    site = Site.model_validate(yaml.safe_load(draft_site("here")))
    assert site.partitions["policy"] == "gpu"
    assert site.partitions["controller"] == "cpu"
    assert (site.gpus.style, site.gpus.per_node) == ("gres", 8)
    assert site.detect.cluster_name


def test_a_het_job_from_submission_to_cancellation(cluster: DevCluster, tmp_path: Path) -> None:
    """Separate controller, two policy nodes, four replicas on one node; USR2, requeue, cancel."""
    job = Job(
        tmp_path / "run",
        {
            "policy": {"parallel": {"dp_shard": 4}},
            "rollout": {"replicas": 4, "parallel": {"tp": 2}},
            "cluster": {
                "secrets": ["WANDB_API_KEY"],
                "controller": {"separate": True},
                "policy": {"nodes": 2, "cpus_per_task": 2},
                "rollout": {"cpus_per_task": 2},
            },
        },
        {},
    )
    try:
        _steps_start_at_once_and_apart(job)
        _nothing_secret_is_visible(cluster, job)
        _states_of_all_components(job)
        _usr2_requeues(job)
        _cancel_ends_everything(cluster, job)
    finally:
        watcher.cancel_job(job.id)


def _steps_start_at_once_and_apart(job: Job) -> None:
    until(
        lambda: len(job.logs("policy") + job.logs("rollout")) == 8,
        what=lambda: (job.root / "job.log").read_text(),
    )
    ranks, replicas = job.logs("policy"), job.logs("rollout")
    assert [rank[0] for rank in ranks] == ["0", "1", "2", "3"]  # %t is the rank, in a group that is not 0
    assert [rank[1] for rank in ranks] == ["gpu1", "gpu1", "gpu2", "gpu2"]
    assert {rank[2] for rank in ranks} == {"4"}
    assert all(len(rank[3].split(",")) == 2 for rank in ranks)
    assert {replica[1] for replica in replicas} == {"gpu-small1"}
    devices = [device for replica in replicas for device in replica[3].split(",")]
    assert sorted(devices) == [str(number) for number in range(8)]
    times = [int(line[4]) for line in ranks + replicas]
    assert max(times) - min(times) <= 15
    assert {line[5] for line in ranks + replicas} == {str(job.root)}
    assert all(line[6].endswith("/cache/triton") for line in ranks + replicas)


def _nothing_secret_is_visible(cluster: DevCluster, job: Job) -> None:
    assert all(line[7:] == ["none", "none"] for line in job.logs("policy") + job.logs("rollout"))
    [started] = job.events("started")
    assert not started["secret"]
    environ = Path(f"/proc/{started['pid']}/environ").read_bytes()
    assert SECRET.encode() not in environ
    files = [path for path in job.root.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in cluster.run("scontrol", "show", "job", job.id).stdout
    pickle = job.root / f"submitit/{job.id}_submitted.pkl"
    assert pickle.stat().st_mode & 0o777 == 0o600
    assert pickle.stat().st_size < 1000
    assert (job.root / "submitit").stat().st_mode & 0o777 == 0o700


def _states_of_all_components(job: Job) -> None:
    state = watcher.job_state(job.id)
    assert state is not None
    assert state.state == "RUNNING"
    assert [c.name for c in state.components] == ["demo:controller", "demo:policy", "demo:rollout"]
    assert [c.nodes for c in state.components] == ["cpu1", "gpu[1-2]", "gpu-small1"]
    assert job.submitted.state == "RUNNING"
    left = watcher.time_left(job.id)
    assert left is not None
    assert 28_000 < left <= 28_800
    watcher.set_comment(job.id, "12/500 reward 0.43")
    until(lambda: _comments(job) == {"12/500 reward 0.43"}, 10)


def _comments(job: Job) -> set[str]:
    state = watcher.job_state(job.id)
    return {c.comment for c in state.components} if state else set()


def _usr2_requeues(job: Job) -> None:
    watcher.signal_supervisor(job.id, "USR2")
    until(lambda: job.events("signal"), 10)
    assert job.events("signal")[0]["name"] == "SIGUSR2"
    until(lambda: job.state() == "REQUEUED", 30, job.state)
    until(lambda: len(job.events("started")) == 2, 60, job.state)
    assert [event["restart"] for event in job.events("started")] == [0, 1]


def _cancel_ends_everything(cluster: DevCluster, job: Job) -> None:
    until(lambda: job.state() == "RUNNING", 30, job.state)
    time.sleep(2)  # the steps of the second attempt
    began = time.monotonic()
    watcher.cancel_job(job.id)
    until(lambda: job.state() == "CANCELLED", 20, job.state)
    until(lambda: not cluster.run("squeue", "-h").stdout.strip(), 20)
    assert time.monotonic() - began < 10
    assert not Path(f"/proc/{job.events('started')[1]['pid']}").exists()
    watcher.cancel_job(job.id)  # once more is no error


@pytest.mark.parametrize("style", ["gres", "gpus_per_node"])
def test_roles_split_one_node(tmp_path: Path, style: str) -> None:
    """placement shared: a plain job whose steps take disjoint GPUs, a CPU role none."""
    job = Job(
        tmp_path / "run",
        {
            "policy": {"parallel": {"dp_shard": 4}},
            "rollout": {"replicas": 2, "parallel": {"tp": 2}},
            "cluster": {
                "placement": "shared",
                "policy": {"cpus_per_task": 2},
                "rollout": {"cpus_per_task": 2},
            },
        },
        {"partitions": {"policy": "gpu", "rollout": "gpu"}, "gpus": {"style": style, "per_node": 8}},
    )
    try:
        until(
            lambda: len(job.logs("policy") + job.logs("rollout")) == 6,
            what=lambda: (job.root / "job.log").read_text(),
        )
        ranks, replicas = job.logs("policy"), job.logs("rollout")
        assert {line[1] for line in ranks + replicas} == {"gpu1"}
        shares = [ranks[0][3], *(replica[3] for replica in replicas)]
        devices = [device for share in shares for device in share.split(",")]
        assert sorted(devices) == [str(number) for number in range(8)]
        assert {rank[3] for rank in ranks} == {ranks[0][3]}
    finally:
        watcher.cancel_job(job.id)
        until(lambda: job.state() in ("CANCELLED", None), 20, job.state)


def test_groups_that_do_not_fit_one_node_lie_node_after_node(tmp_path: Path) -> None:
    job = Job(
        tmp_path / "run",
        {
            "policy": {"parallel": {"dp_shard": 8}},
            "rollout": {"replicas": 2, "parallel": {"tp": 4}},
            "cluster": {
                "placement": "shared",
                "policy": {"cpus_per_task": 1},
                "rollout": {"cpus_per_task": 2},
            },
        },
        {"partitions": {"policy": "gpu", "rollout": "gpu"}},
    )
    try:
        until(
            lambda: len(job.logs("policy") + job.logs("rollout")) == 10,
            what=lambda: (job.root / "job.log").read_text(),
        )
        assert {line[1] for line in job.logs("policy")} == {"gpu1"}
        assert {line[1] for line in job.logs("rollout")} == {"gpu2"}
    finally:
        watcher.cancel_job(job.id)
        until(lambda: job.state() in ("CANCELLED", None), 20, job.state)


def test_gpus_per_task_as_the_sites_style(tmp_path: Path) -> None:
    job = Job(
        tmp_path / "run",
        {
            "policy": {"parallel": {"dp_shard": 2}},
            "rollout": {"replicas": 2, "parallel": {"tp": 2}},
            "cluster": {"policy": {"cpus_per_task": 2}, "rollout": {"cpus_per_task": 2}},
        },
        {"gpus": {"style": "gpus_per_task", "per_node": 8}},
    )
    try:
        until(
            lambda: len(job.logs("policy") + job.logs("rollout")) == 4,
            what=lambda: (job.root / "job.log").read_text(),
        )
        assert [rank[3] for rank in job.logs("policy")] == ["0,1", "0,1"]
        assert sorted(replica[3] for replica in job.logs("rollout")) == ["0,1", "2,3"]
    finally:
        watcher.cancel_job(job.id)
        until(lambda: job.state() in ("CANCELLED", None), 20, job.state)


def test_a_signal_while_python_starts_does_not_end_the_job(tmp_path: Path) -> None:
    template = tmp_path / "slow.sbatch.j2"
    template.write_text(
        '{% extends "job.sbatch.j2" %}{% block before %}\ntouch slow\nsleep 3\n{% endblock %}'
    )
    job = Job(tmp_path / "run", {**SFT, "cluster": {"template": str(template)}}, {})
    try:
        until(lambda: (job.root / "slow").exists())
        watcher.signal_supervisor(job.id, "USR2")
        until(lambda: job.events("started"), 30, job.state)
        assert job.state() == "RUNNING"
        assert not job.events("signal")
    finally:
        watcher.cancel_job(job.id)
        until(lambda: job.state() in ("CANCELLED", None), 20, job.state)


def test_a_job_that_must_not_be_requeued_says_so(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", SFT, {"requeue": False})
    try:
        until(lambda: job.events("started"), 30, job.state)
        with pytest.raises(SlurmError, match="disabled"):
            watcher.requeue(job.id)
    finally:
        watcher.cancel_job(job.id)
        until(lambda: job.state() in ("CANCELLED", None), 20, job.state)


def test_sacct_of_a_real_het_job_is_read(
    accounting_devcluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", accounting_devcluster.env["SLURM_CONF"])
    monkeypatch.delenv("SBATCH_PARTITION")
    script = tmp_path / "het.sbatch"
    options = "--time=5 --mem=100M --output=/dev/null"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --job-name=t:policy --partition=policy {options}\n#SBATCH hetjob\n"
        f"#SBATCH --job-name=t:rollout --partition=rollout {options}\nsleep 2\nexit 7\n"
    )
    job_id = accounting_devcluster.run("sbatch", "--parsable", str(script)).stdout.strip()

    def rows() -> str:
        return accounting_devcluster.run("sacct", "-n", "-P", "-X", "-o", SACCT_FORMAT, "-j", job_id).stdout

    def read() -> list[tuple[str, str, str]]:
        job = parse_sacct(rows()).get(job_id)
        return [(c.name, c.state, c.exit_code) for c in job.components] if job else []

    # The first rows of a het job carry neither offset nor name.
    until(lambda: read() == [(f"t:{role}", "FAILED", "7:0") for role in ("policy", "rollout")], 60, rows)
    known = watcher.job_state(job_id)
    assert known is not None
    assert known.state == "FAILED"


def test_the_runs_exit_code_is_the_jobs(tmp_path: Path) -> None:
    job = Job(
        tmp_path / "run",
        {"kind": "sft", "algorithm": {}, "reward": [], "rollout": None},
        {},
        "slurm_payload:fail",
    )
    until(lambda: job.state() == "FAILED", 60, job.state)
    state = watcher.job_states([job.id, "99999"])
    assert set(state) == {job.id}  # one query for both; Slurm knows nothing of the other


def test_sbatch_words_reach_the_user_and_leave_no_files(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    recipe, plan, site = build({"cluster": {"policy": {"partition": "nope"}}}, {})
    script = JobScript.of(recipe, plan, site, run_dir=root, log=root / "job.log")
    with pytest.raises(SlurmError, match="invalid partition"):
        HetSlurmExecutor(root / "submitit", script).submit(SupervisorTask(str(root)))
    assert not list((root / "submitit").iterdir())


def test_without_a_controller_there_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmError, match="not on PATH"):
        watcher.job_state("1")
