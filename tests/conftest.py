"""Fixtures of all rooms; makes this folder's helper modules (`tiny_models`, ...) importable."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl.cluster.devcluster import DevCluster, MissingPackages, ProfileSpec, default_spec


def _session_cluster(name: str, spec: ProfileSpec) -> Iterator[DevCluster]:
    """Up at the first test that asks, down at the end of the session; skips where packages are missing."""
    # A short path (Unix sockets) that, under root, other users can reach too.
    cluster = DevCluster(Path(tempfile.gettempdir()) / f"hpc-rl-{name}-{os.getpid()}", spec)
    try:
        cluster.up()
    except MissingPackages as missing:
        pytest.skip(str(missing))
    try:
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="session")
def devcluster() -> Iterator[DevCluster]:
    """A private real Slurm: 2 policy, 2 rollout, 1 cpu node, 4 fake GPUs, a preempting partition `urgent`.

    One per session: end what you submit (`devcluster.cancel_all()`).
    """
    yield from _session_cluster("test", default_spec(urgent=True))


@pytest.fixture(scope="session")
def accounting_devcluster() -> Iterator[DevCluster]:
    """The same with slurmdbd, for tests that need `sacct`. About ten seconds to start."""
    yield from _session_cluster("acct", default_spec(accounting=True))
