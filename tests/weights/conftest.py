"""A real Redis of its own for each test: transfer groups of two tests may have the same name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_rl.bus.server import RedisServer


@pytest.fixture
def bus_file(tmp_path: Path) -> Iterator[Path]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    server.write_bus_file(tmp_path / "bus" / "bus.json")
    yield tmp_path / "bus" / "bus.json"
    server.stop()
