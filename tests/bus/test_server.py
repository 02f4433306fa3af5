"""Starting Redis: ports, permissions, missing binary, failures that say why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_rl.bus import network
from hpc_rl.bus.errors import RedisFailed, RedisMissing
from hpc_rl.bus.server import RedisServer, find_binary

pytestmark = pytest.mark.redis


def test_a_taken_port_is_replaced(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = RedisServer(tmp_path / "redis", port=port)
        server.start()
        try:
            assert server.port != port
            assert server.poll() is None
        finally:
            server.stop()


def test_files_are_private_and_the_password_is_not_on_the_command_line(server: RedisServer) -> None:
    assert server.folder.stat().st_mode & 0o777 == 0o700
    assert (server.folder / "redis.conf").stat().st_mode & 0o777 == 0o600
    command_line = Path(f"/proc/{server.pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{server.pid}/environ").read_bytes()
    assert server.password.encode() not in command_line + environment


def test_it_listens_on_the_given_addresses_only(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis", ["127.0.0.3", "127.0.0.1"])
    server.start()
    try:
        for host, reached in (("127.0.0.3", True), ("127.0.0.1", True), ("127.0.0.4", False)):
            with socket.socket() as client:
                assert (client.connect_ex((host, server.port)) == 0) is reached
    finally:
        server.stop()


def test_stop_leaves_nothing(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    server.start()
    pid = server.pid
    server.stop()
    assert not server.folder.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_a_missing_binary_says_where_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RedisMissing, match=r"conda-forge.*redis_server"):
        find_binary()
    with pytest.raises(RedisMissing, match="no-such-binary"):
        find_binary("no-such-binary")


def test_a_binary_that_fails_shows_its_words(tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text(
        "#!/bin/sh\nsed -n 's/^logfile //p' $1 | while read f; do echo '# bad luck' > $f; done\nexit 3\n"
    )
    binary.chmod(0o755)
    server = RedisServer(tmp_path / "redis", binary=str(binary))
    with pytest.raises(RedisFailed, match=r"exit code 3.*bad luck"):
        server.start()


def test_a_binary_that_hangs_meets_the_deadline(tmp_path: Path) -> None:
    binary = tmp_path / "redis-server"
    binary.write_text("#!/bin/sh\nexec sleep 60\n")
    binary.chmod(0o755)
    server = RedisServer(tmp_path / "redis", binary=str(binary))
    start = time.monotonic()
    with pytest.raises(RedisFailed, match="did not answer in time"):
        server.start(0.5)
    assert time.monotonic() - start < 5
    assert server.pid is None


def test_redis_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from hpc_rl.bus.server import RedisServer\n"
        "server = RedisServer(pathlib.Path(sys.argv[1])); server.start(); print(server.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "redis")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _lives(pid):
        time.sleep(0.02)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_another_user_reaches_nothing(server: RedisServer, tmp_path: Path, bus_file: Path) -> None:
    script = (
        "import socket, sys\n"
        "for path in sys.argv[2:]:\n"
        "    try: open(path).read(); sys.exit('read ' + path)\n"
        "    except PermissionError: pass\n"
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "s.sendall(b'XADD inbox:controller:0 * a b\\r\\nAUTH guess\\r\\n'); s.settimeout(5)\n"
        "answer = b''\n"
        "while answer.count(b'\\r\\n') < 2: answer += s.recv(4096)\n"
        "sys.exit(0 if b'-NOAUTH' in answer and b'-WRONGPASS' in answer else repr(answer))\n"
    )
    paths = [server.folder / "redis.conf", bus_file]
    for folder in (*tmp_path.parents[:-1], tmp_path):
        if str(folder) not in ("/", "/tmp"):
            folder.chmod(0o755)  # only the files' and the run's own modes protect here
    done = subprocess.run(
        [
            "setpriv",
            "--reuid=nobody",
            "--clear-groups",
            sys.executable,
            "-c",
            script,
            str(server.port),
            *paths,
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr


def test_network_addresses() -> None:
    assert network.interface_address("lo") == "127.0.0.1"
    with pytest.raises(network.NoAddress, match=r"no-such-if.*lo"):
        network.interface_address("no-such-if")
    assert network.host_address("localhost") == "127.0.0.1"
    with pytest.raises(network.NoAddress, match=r"nowhere\.invalid"):
        network.host_address("nowhere.invalid")
    assert network.can_bind("127.0.0.1")
    assert not network.can_bind("192.0.2.1")
