"""Fixtures of all rooms."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl.bus.server import RedisServer
from hpc_rl.cluster.devcluster import DevCluster, MissingPackages, ProfileSpec, default_spec


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests come first: `make test` gives whole files to two workers, and none of these is
    to be left for the end."""
    long_marks = {"slurm", "vllm", "slow"}
    long_files = {item.path for item in items if long_marks & {mark.name for mark in item.iter_markers()}}
    items.sort(key=lambda item: item.path not in long_files)


def up_and_down(name: str, spec: ProfileSpec) -> Iterator[DevCluster]:
    """A cluster that is up for as long as the fixture lives; skips where packages are missing."""
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
    yield from up_and_down("test", default_spec(urgent=True))


@pytest.fixture(scope="session")
def accounting_devcluster() -> Iterator[DevCluster]:
    """The same with slurmdbd, for tests that need `sacct`. About ten seconds to start."""
    yield from up_and_down("acct", default_spec(accounting=True))


@pytest.fixture(scope="session")
def bus_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bus file of one real Redis for all tests that ask (`tests/bus` gives each test its own)."""
    folder = tmp_path_factory.mktemp("redis")
    server = RedisServer(folder / "data")
    server.start()
    server.write_bus_file(folder / "bus.json")
    yield folder / "bus.json"
    server.stop()
