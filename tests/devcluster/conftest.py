"""Every test of this folder leaves the shared devcluster idle, also when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc_rl.cluster.devcluster import DevCluster
from tests.devcluster.hetjob import HetJob


@pytest.fixture
def het_job(devcluster: DevCluster, tmp_path: Path) -> Iterator[Callable[..., HetJob]]:
    """`het_job(**options)` submits the test job and waits until its three tasks run."""
    jobs: list[HetJob] = []

    def submit(**options: object) -> HetJob:
        job = HetJob(devcluster, tmp_path / f"job{len(jobs)}")
        jobs.append(job)
        return job.submit(**options).started()  # type: ignore[arg-type]

    yield submit
    devcluster.cancel_all()
    for job in jobs:
        job.end_children()
