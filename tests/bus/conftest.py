"""A real Redis of its own for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl.bus.client import Bus
from hpc_rl.bus.server import RedisServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    server.write_bus_file(tmp_path / "bus.json")
    yield server
    server.stop()


@pytest.fixture
def bus_file(server: RedisServer, tmp_path: Path) -> Path:
    return tmp_path / "bus.json"


@pytest.fixture
def bus(bus_file: Path) -> Iterator[Bus]:
    bus = Bus.connect(bus_file, 5.0)
    yield bus
    bus.close()
