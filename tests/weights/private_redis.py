"""A private Redis with a password, for tests that need the bus."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bus_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bus file (0600) of a fresh redis-server on a free loopback port."""
    folder = tmp_path_factory.mktemp("redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    password = secrets.token_hex(16)
    config = folder / "redis.conf"
    config.write_text(f'port {port}\nbind 127.0.0.1\nrequirepass {password}\nsave ""\ndir {folder}\n')
    config.chmod(0o600)
    server = subprocess.Popen(["redis-server", str(config)], stdout=subprocess.DEVNULL)
    path = folder / "bus.json"
    path.touch(0o600)
    path.write_text(json.dumps({"host": "127.0.0.1", "port": port, "password": password}))
    os.chmod(path, 0o600)
    deadline = time.monotonic() + 20
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert time.monotonic() < deadline, "redis-server did not start in 20 s"
        assert server.poll() is None, "redis-server exited"
        time.sleep(0.05)
    yield path
    server.terminate()
    server.wait(10)
