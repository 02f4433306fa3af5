"""The run's own Redis: started, watched and stopped by the supervisor.

It asks for a password that is in a 0600 file only, listens on the addresses the placement needs,
and keeps an append-only file in a private folder on node-local disk, so that a Redis that was killed
comes back with every acknowledged message: it writes to the file before it answers. It leaves the
fsync to the kernel (`everysec` holds writes back while an fsync runs, and a kill then loses them);
what must survive the node is in the controller's snapshot.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from hpc_rl.bus.errors import RedisFailed, RedisMissing
from hpc_rl.run.paths import write_private
from hpc_rl.run.process import describe_exit, die_with_parent, exit_code

START_S = 20.0
_PORT_TRIES = 20
_CONF = """\
port {port}
bind {bind}
protected-mode yes
requirepass {password}
dir {dir}
logfile {log}
daemonize no
save ""
appendonly yes
appendfsync no
maxmemory 0
maxmemory-policy noeviction
tcp-keepalive 60
timeout 0
"""


def find_binary(configured: str | None = None) -> str:
    """Path of redis-server: the recipe's, else on PATH, else beside this Python. Raises RedisMissing."""
    if configured:
        path = shutil.which(os.path.expanduser(configured))
        if path is None:
            raise RedisMissing(
                f"cluster.controller.redis_server is {configured!r}, which is no executable file on "
                f"{socket.gethostname()}"
            )
        return path
    path = shutil.which("redis-server") or shutil.which(os.path.join(sys.prefix, "bin", "redis-server"))
    if path is None:
        raise RedisMissing(
            "redis-server is not on PATH. Install the Debian package `redis-server`, or without root the "
            "conda-forge package `redis-server` (conda install -c conda-forge redis-server), and set "
            "cluster.controller.redis_server to its path"
        )
    return path


def free_port(hosts: Sequence[str]) -> int:
    """A TCP port that is free on every one of `hosts` now (somebody may take it before it is used)."""
    for _ in range(_PORT_TRIES):
        with socket.socket() as first:
            first.bind((hosts[0], 0))
            port = int(first.getsockname()[1])
            try:
                for host in hosts[1:]:
                    with socket.socket() as other:
                        other.bind((host, port))
            except OSError:
                continue
            return port
    raise RedisFailed(f"no TCP port is free on all of {', '.join(hosts)}")


class RedisServer:
    """A redis-server child of this process. `folder` is on node-local disk and is made 0700.

    `hosts` are the addresses to listen on; the first one is what clients of other nodes use.
    The first start chooses the port (unless given) and the password; `restart` keeps both, and the data.
    """

    def __init__(
        self,
        folder: Path,
        hosts: Sequence[str] = ("127.0.0.1",),
        *,
        binary: str | None = None,
        port: int | None = None,
    ) -> None:
        self.folder = folder
        self.hosts = list(dict.fromkeys(hosts))
        self.port = port
        self.password = secrets.token_urlsafe(24)
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "redis.log"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, deadline_s: float = START_S) -> None:
        """Start and wait until Redis answers with our password.

        Another port is chosen when the first one is taken. Raises RedisMissing, or RedisFailed with
        the tail of the log.
        """
        binary = find_binary(self._binary)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.folder, 0o700)
        deadline = time.monotonic() + deadline_s
        for _ in range(_PORT_TRIES):
            if self.port is None:
                self.port = free_port(self.hosts)
            if self._start_on(binary, self.port, deadline):
                return
            self.port = None
        raise RedisFailed(f"redis-server found no free port on {', '.join(self.hosts)}: {self._tail()}")

    def restart(self, deadline_s: float = START_S) -> None:
        """Start again on the same data and password, and the same port if nobody took it."""
        self.kill()
        self.start(deadline_s)

    def write_bus_file(self, path: Path) -> None:
        """Write host, port and password for the bus clients (0600)."""
        content = {"host": self.hosts[0], "port": self.port, "password": self.password}
        path.parent.mkdir(mode=0o700, exist_ok=True)
        write_private(path, json.dumps(content).encode())

    def poll(self) -> int | None:
        """None while Redis runs, else how it ended (128+n for signal n)."""
        if self._process is None:
            return 0
        code = self._process.poll()
        return None if code is None else exit_code(code)

    def stop(self, deadline_s: float = 3.0) -> None:
        """SIGTERM, then SIGKILL after `deadline_s`; then the data folder is removed."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                pass
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def explain(self) -> str:
        """How Redis ended and the last words of its log, in one line."""
        code = self.poll()
        ended = "is still running" if code is None else f"ended with {describe_exit(code)}"
        return f"redis-server (port {self.port}) {ended}; its log ends: {self._tail()}"

    def _start_on(self, binary: str, port: int, deadline: float) -> bool:
        """True when Redis answers on `port`, False when the port was taken meanwhile."""
        conf = self.folder / "redis.conf"
        text = _CONF.format(
            port=port, bind=" ".join(self.hosts), password=self.password, dir=self.folder, log=self.log
        )
        write_private(conf, text.encode())
        self.log.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [binary, str(conf)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        client = redis.Redis(
            host=self.hosts[0],
            port=port,
            password=self.password,
            socket_timeout=0.5,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
        try:
            while self._process.poll() is None:
                try:
                    # Another server may hold the port of one of the addresses: only ours knows the password.
                    if client.ping():
                        return True
                except redis.RedisError:
                    pass
                if time.monotonic() > deadline:
                    self.kill()
                    raise RedisFailed(f"redis-server on port {port} did not answer in time: {self._tail()}")
                time.sleep(0.02)
        finally:
            client.close()
        if "Address already in use" in self._tail(20):
            return False
        raise RedisFailed(self.explain())

    def _tail(self, lines: int = 4) -> str:
        try:
            text = self.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return "(no log)"
        words = [line.split("* ", 1)[-1].split("# ", 1)[-1].strip() for line in text if line.strip()]
        return " | ".join(words[-lines:])
