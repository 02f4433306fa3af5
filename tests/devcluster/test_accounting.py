"""slurmdbd and MariaDB under the devcluster: sacct knows the components, accounts and QOS are enforced."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from hpc_rl.cluster.devcluster import DevCluster, missing_packages, spec_of
from hpc_rl.cluster.devcluster.spec import PartitionSpec, ProfileSpec
from tests.devcluster.hetjob import HetJob

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def _sacct(cluster: DevCluster, job_id: str) -> dict[str, str]:
    answer = cluster.run("sacct", "-n", "-P", "-j", job_id, "-o", "JobID,State,ExitCode", check=False)
    return {line.split("|")[0]: "|".join(line.split("|")[1:]) for line in answer.stdout.splitlines()}


def test_sacct_shows_both_components_and_their_steps(
    accounting_devcluster: DevCluster, tmp_path: Path
) -> None:
    cluster = accounting_devcluster
    job = HetJob(cluster, tmp_path / "job").submit(obedient=True).started()
    (job.folder / "task1").write_text("3")
    job.wait(lambda: job.events("supervisor", "step_exit"), "the rollout step to end")
    (job.folder / "exit").write_text("0")
    assert job.ended() == ["COMPLETED", "COMPLETED"]
    # slurmctld hands its records over in batches, some seconds later.
    done = {f"{job.job_id}+{k}": "COMPLETED|0:0" for k in (0, 1)}
    job.wait(lambda: done.items() <= _sacct(cluster, job.job_id).items(), "sacct to show both components")
    rows = _sacct(cluster, job.job_id)
    assert rows[f"{job.job_id}+0.batch"] == "COMPLETED|0:0"
    assert [value for key, value in rows.items() if key.startswith(f"{job.job_id}+1.")] == ["FAILED|3:0"]


def test_accounts_and_qos_are_enforced_where_the_layout_names_them() -> None:
    if missing := missing_packages(accounting=True):
        pytest.skip(f"devcluster: install the Debian packages {' '.join(missing)}")
    base = spec_of([PartitionSpec("p")])
    spec = ProfileSpec(partitions=base.partitions, accounting=True, accounts=("lab",), qos=("fast",))
    root = Path(tempfile.mkdtemp(prefix="hpc-rl-"))
    with DevCluster(root, spec) as cluster:

        def test_only(*options: str) -> str:
            return cluster.run("sbatch", "--test-only", *options, "--wrap=true", check=False).stderr

        assert "to start at" in test_only("--account=lab", "--qos=fast")
        assert "Invalid account" in test_only("--account=nobodys")
        assert "Invalid qos" in test_only("--account=lab", "--qos=slow")
    root.rmdir()
