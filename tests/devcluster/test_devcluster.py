"""The devcluster itself: up, down, what it leaves behind (nothing), who may run it, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from hpc_rl.cluster.devcluster import (
    DevCluster,
    DevClusterError,
    PartitionSpec,
    ProfileSpec,
    default_spec,
    missing_packages,
    processes,
)
from tests.devcluster.hetjob import HetJob, alive

pytestmark = pytest.mark.slurm
HERE = Path(__file__).resolve().parent
SMALL = default_spec(policy=2, rollout=1, cpu=0, gpus=1)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path that other users can enter; skips where Slurm is not installed."""
    if missing := missing_packages():
        pytest.skip(f"devcluster: install the Debian packages {' '.join(missing)}")
    path = Path(tempfile.mkdtemp(prefix="hpc-rl-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def _installed_slurm() -> dict[str, float]:
    """Every file of an installed Slurm and munge with its time of change."""
    roots = ("/etc/slurm", "/etc/munge", "/var/lib/slurm", "/var/spool/slurm", "/var/log/slurm", "/run/munge")
    files = [path for root in roots for path in [Path(root), *Path(root).rglob("*")] if path.exists()]
    return {str(path): path.stat().st_ctime for path in files}


def test_down_leaves_nothing_even_under_jobs_that_do_not_end(folder: Path) -> None:
    before = _installed_slurm()
    cluster = DevCluster(folder / "dc", dataclasses.replace(SMALL, kill_wait_s=60)).up()
    token = cluster._up_state().token
    job = HetJob(cluster, folder / "job").submit().started()  # ignores SIGTERM
    pids = [e["pid"] for e in job.events(event="start")] + [job.events(event="child")[0]["child"]]
    pids += [record.pid for record in cluster._up_state().processes]
    assert all(alive(pid) for pid in pids)
    cluster.spec = dataclasses.replace(cluster.spec, kill_wait_s=-4)  # do not wait a minute for the jobs
    cluster.down()
    assert not any(alive(pid) for pid in pids)
    assert processes.processes_with({processes.MARK: token}) == []
    assert not (folder / "dc").exists()
    assert cluster.status().state == "none"
    assert _installed_slurm() == before


def test_a_folder_of_the_users_own_is_kept_or_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    with DevCluster(folder / "empty", SMALL) as cluster:
        with pytest.raises(DevClusterError, match="is up in"):
            DevCluster(folder / "empty", SMALL).up()
        assert cluster.status().state == "up"
    assert list((folder / "empty").iterdir()) == []
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(DevClusterError, match="not an empty folder"):
        DevCluster(folder / "mine", SMALL).up()
    DevCluster(folder / "mine").down()
    assert (folder / "mine" / "thesis.tex").exists()


def test_a_cluster_that_does_not_come_up_says_why_and_leaves_nothing(folder: Path) -> None:
    bad = dataclasses.replace(SMALL, parameters={"SelectType": "select/no_such"})
    with pytest.raises(DevClusterError, match=r"slurm(ctld|d).*ended.*no_such"):
        DevCluster(folder / "dc", bad).up()
    assert not (folder / "dc").exists()


def test_a_daemon_can_be_lost_and_started_again_and_up_clears_after_a_crash(folder: Path) -> None:
    cluster = DevCluster(folder / "dc", SMALL).up()
    cluster.stop_daemon("slurmd-rollout1")
    assert cluster.status().state == "broken"
    cluster.start_daemon("slurmd-rollout1")
    assert cluster.status().daemons["slurmd-rollout1"]
    assert cluster.run("srun", "--partition=rollout", "hostname").stdout.strip()
    for name in cluster.status().daemons:  # a machine that went down, say
        cluster.stop_daemon(name)
    again = DevCluster(folder / "dc")
    assert again.status().state == "down"
    with DevCluster(folder / "dc", SMALL) as fresh:
        assert fresh.status().state == "up"
    again.down()


def test_the_command_line_from_three_processes(folder: Path) -> None:
    def call(*argv: str) -> subprocess.CompletedProcess[str]:
        code = "from hpc_rl.cli.devcluster import app; app()"
        command = [sys.executable, "-c", code, *argv, "--dir", str(folder / "dc")]
        return subprocess.run(command, text=True, capture_output=True, timeout=90, check=False)

    up = call("up", "--partition", "big:2:1", "--partition", "small:1", "--json")
    assert up.returncode == 0, up.stderr
    said = json.loads(up.stdout)
    assert yaml.safe_load(Path(said["site"]).read_text())["partitions"]["policy"] == "big"
    sinfo = subprocess.run(
        ["sinfo", "-h", "-o", "%R %D"],
        env={**os.environ, "SLURM_CONF": said["slurm_conf"]},
        text=True,
        capture_output=True,
        check=True,
    )
    assert sorted(sinfo.stdout.splitlines()) == ["big 2", "small 1"]
    status = call("status", "--json")
    assert status.returncode == 0
    assert json.loads(status.stdout)["nodes"] == {"big1": "idle", "big2": "idle", "small1": "idle"}
    assert call("down").returncode == 0
    assert call("status").returncode == 1
    assert not (folder / "dc").exists()


def test_thirteen_nodes_with_features_take_the_het_scripts_that_name_them(folder: Path) -> None:
    spec = ProfileSpec(
        partitions=(
            PartitionSpec(
                "gpu", nodes=8, cpus=64, memory_mb=512_000, gpus=8, features=("a100",), default=True
            ),
            PartitionSpec("gpu-small", nodes=4, cpus=32, gpus=4, features=("l40",)),
            PartitionSpec("cpu", nodes=1),
        )
    )
    script = folder / "job.sbatch"

    def test_only(constraint: str, gpus: int) -> subprocess.CompletedProcess[str]:
        script.write_text(
            "#!/bin/bash\n#SBATCH --partition=cpu --ntasks=1 --mem=1G\n#SBATCH hetjob\n"
            f"#SBATCH --partition=gpu --nodes=8 --gres=gpu:{gpus} --mem=500G --constraint={constraint}\n"
            "#SBATCH hetjob\n#SBATCH --partition=gpu-small --nodes=4 --gres=gpu:4 --mem=9G\nhostname\n"
        )
        return cluster.run("sbatch", "--test-only", str(script), check=False)

    with DevCluster(folder / "dc", spec) as cluster:
        assert len(cluster.status().nodes) == 13
        assert test_only("a100", 8).returncode == 0
        assert "Invalid feature" in test_only("h100", 8).stderr
        assert "node configuration is not available" in test_only("a100", 9).stderr


_SETPRIV = [
    "setpriv",
    "--reuid",
    "nobody",
    "--regid",
    "nogroup",
    "--clear-groups",
    "env",
    "HOME=/nonexistent",
]


def _interpreter_of_nobody(path: Path) -> str | None:
    """A Python >= 3.11 that `nobody` may run with `path` as its library, or None."""
    code = "import sys, yaml, hpc_rl.cluster.devcluster; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*_SETPRIV, f"PYTHONPATH={path}", python, "-c", code]
        if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0:
            return python
    return None


@pytest.mark.slow
def test_it_works_as_nobody_with_the_distributions_packages(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody; every other test here already ran as a normal user")
    # The checkout and the virtual environment may lie where nobody cannot read.
    library = folder / "lib"
    shutil.copytree(
        HERE.parents[1] / "hpc_rl", library / "hpc_rl", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(Path(yaml.__file__).parent, library / "yaml")
    for name in ("as_user.py", "hetjob.py", "job_supervisor.py", "job_task.py"):
        shutil.copy(HERE / name, library)
    python = _interpreter_of_nobody(library)
    if python is None:
        pytest.skip(f"user nobody can run neither {sys.executable} nor a /usr/bin/python3 of 3.11 or newer")
    work = folder / "work"
    work.mkdir()
    shutil.chown(work, "nobody", "nogroup")
    command = [*_SETPRIV, f"PYTHONPATH={library}", python, str(library / "as_user.py"), str(work)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120, cwd=work, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("uid") != 0
    assert said.pop("up_seconds") < 30
    assert said == {
        "state": "up",
        "partitions": {"task0.0": "policy", "task0.1": "policy", "task1.0": "rollout"},
        "restarts": ["1", "1"],
        "cancelled": ["CANCELLED", "CANCELLED"],
        "gpus": ["0", "1"],
        "gone": True,
    }
