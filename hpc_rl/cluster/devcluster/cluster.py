"""DevCluster: a private real Slurm on this machine, brought up, watched and taken down as one thing.

Everything lives below one folder: configuration, munge key and socket, spool, logs, the database. The daemons
run in the foreground as recorded processes (`state.json`), so no pid file is trusted and nothing is guessed.
"""

from __future__ import annotations

import logging
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hpc_rl.cluster.devcluster import accounting, config, devices, munge, packages, ports, processes, profile
from hpc_rl.cluster.devcluster.errors import DevClusterError
from hpc_rl.cluster.devcluster.spec import ProfileSpec, default_spec
from hpc_rl.cluster.devcluster.state import FILE, State
from hpc_rl.run.paths import write_private

_log = logging.getLogger(__name__)
_LONGEST_ROOT = 80  # munge's and MariaDB's sockets must fit into a sockaddr_un (108 bytes)


@dataclass(frozen=True)
class Status:
    """What `status` shows. `state` is up, broken (some daemon gone), down or none (there is none here);
    `nodes` maps name to Slurm's state.
    """

    dir: Path
    state: str
    daemons: dict[str, bool]
    nodes: dict[str, str]
    jobs: int


def default_dir() -> Path:
    """One devcluster per user unless told otherwise."""
    return Path(tempfile.gettempdir()) / f"hpc-rl-devcluster-{os.geteuid()}"


class DevCluster:
    """A devcluster in `root`. Without `spec` the one recorded there is used, or the default layout.

    Use it as a context manager, or call `up` and `down`. `env` is what Slurm's commands need.
    """

    def __init__(self, root: Path | str, spec: ProfileSpec | None = None) -> None:
        self.root = Path(root).absolute()
        self._state = State.load(self.root)
        self.spec = spec or (self._state.spec if self._state else default_spec())
        self._children: list[subprocess.Popen[bytes]] = []

    # ---- what a user of the cluster needs --------------------------------------------------

    @property
    def env(self) -> dict[str, str]:
        """The variables that point Slurm's commands at this cluster."""
        return {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    @property
    def site_profile(self) -> Path:
        """The YAML to give to `--site`: CPU runs."""
        return self.root / f"{profile.CPU}.yaml"

    @property
    def gpu_site_profile(self) -> Path | None:
        """The profile that asks for the fake GPUs; None where the policy or the rollout nodes have none."""
        return self.root / f"{profile.GPU}.yaml" if profile.has_gpus(self.spec) else None

    def run(
        self,
        *argv: str,
        timeout_s: float = 30.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command against this cluster with a scrubbed environment; raises with its stderr."""
        try:
            result = subprocess.run(
                list(argv),
                env={**packages.clean_environ(), **(env or {}), **self.env},
                cwd=cwd,
                text=True,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DevClusterError(f"{' '.join(argv)} did not answer within {timeout_s:.0f} s") from None
        if check and result.returncode != 0:
            raise DevClusterError(f"{' '.join(argv)} failed ({result.returncode}): {result.stderr.strip()}")
        return result

    def __enter__(self) -> DevCluster:
        return self.up()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    # ---- up --------------------------------------------------

    def up(self, timeout_s: float = 60.0) -> DevCluster:
        """Start everything and wait until all nodes are idle. On failure nothing is left behind.

        Raises MissingPackages, or DevClusterError with the log of the daemon that did not come up.
        """
        programs = packages.find_programs(accounting=self.spec.accounting)
        self._claim_folder()
        try:
            state = self._prepare()
            self._start_all(state, programs, time.monotonic() + timeout_s)
        except BaseException:
            self.down()
            raise
        profile.write(self.spec, self.root)
        return self

    def _claim_folder(self) -> None:
        """Refuse to start in a folder that is in use or holds other files; clear one that a crash left."""
        if len(str(self.root)) > _LONGEST_ROOT:
            raise DevClusterError(
                f"{self.root} is too long for a Unix socket ({len(str(self.root))} characters, "
                f"{_LONGEST_ROOT} at most); choose a shorter --dir"
            )
        if any(c.isspace() or c in "#,=\\\"'%[]" for c in str(self.root)):
            raise DevClusterError(
                f"{self.root}: Slurm's configuration cannot hold this path; choose a plain --dir"
            )
        if self._state is not None:
            if any(record.alive() for record in self._state.processes):
                raise DevClusterError(f"a devcluster is up in {self.root}; `hpc-rl devcluster down` ends it")
            self.down()
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise DevClusterError(f"{self.root} exists and is not an empty folder; choose another --dir")

    def _prepare(self) -> State:
        """Folders, ports, key and configuration. Root's cluster serves every user, a user's only himself."""
        made_dir = not self.root.exists()
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755 if os.geteuid() == 0 else 0o700)
        nodes = [node for part in self.spec.partitions for node in part.own_nodes]
        free = ports.free_ports(len(nodes) + 2)
        self._state = state = State(
            spec=self.spec,
            token=secrets.token_hex(16),
            made_dir=made_dir,
            ctld_port=free[0],
            node_ports=dict(zip(nodes, free[2:], strict=True)),
            dbd_port=free[1] if self.spec.accounting else None,
        )
        state.save(self.root)
        layout = self._layout(state)
        for folder in ("etc", "log", "munge", "run", "state", *(f"state/{node}" for node in nodes)):
            (self.root / folder).mkdir(mode=0o755)
        for folder in ("munge/key", "state/ctld", *(("mysql", "mysql/data") if self.spec.accounting else ())):
            (self.root / folder).mkdir(mode=0o700)
        write_private(layout.munge_key, secrets.token_bytes(1024))
        gpus = devices.fake_gpus(layout.devices, max(part.gpus for part in self.spec.partitions))
        layout.conf.write_text(config.slurm_conf(self.spec, layout))
        layout.gres_conf.write_text(config.gres_conf(self.spec, gpus))
        if self.spec.accounting:
            write_private(layout.dbd_conf, config.slurmdbd_conf(layout).encode())
        return state

    def _layout(self, state: State) -> config.Layout:
        try:
            user = pwd.getpwuid(os.geteuid()).pw_name
        except KeyError:
            raise DevClusterError(
                f"user id {os.geteuid()} has no name in /etc/passwd; Slurm needs one for SlurmUser"
            ) from None
        return config.Layout(
            self.root,
            socket.gethostname().split(".")[0],
            user,
            state.ctld_port,
            state.node_ports,
            state.dbd_port,
        )

    def _start_all(self, state: State, programs: Mapping[str, str], deadline: float) -> None:
        layout = self._layout(state)
        self._start("munged", munge.munged(programs, layout))
        _wait(layout.munge_socket.exists, deadline, lambda: f"munged's socket: {self._log('munged')}")
        if self.spec.accounting:
            self._start_accounting(programs, layout, deadline)
        self._start("slurmctld", [programs["slurmctld"], "-D", "-f", str(layout.conf)])
        for node in state.node_ports:
            self._start(f"slurmd-{node}", [programs["slurmd"], "-D", "-N", node, "-f", str(layout.conf)])
        _wait(self._all_idle, deadline, self._why_not_idle)

    def _start_accounting(self, programs: Mapping[str, str], layout: config.Layout, deadline: float) -> None:
        made = self.run(*accounting.install_db(programs, layout), check=False, timeout_s=60)
        if made.returncode != 0:
            raise DevClusterError(f"mariadb-install-db failed: {made.stdout[-800:]}{made.stderr[-800:]}")
        self._start("mariadbd", accounting.mariadbd(programs, layout))
        ping = accounting.ping(programs, layout)
        _wait(lambda: self._answers(ping), deadline, lambda: f"mariadbd: {self._log('mariadbd')}")
        # MariaDB's client library takes the socket of "localhost" from this variable.
        self._start(
            "slurmdbd", [programs["slurmdbd"], "-D"], extra_env={"MYSQL_UNIX_PORT": str(layout.mysql_socket)}
        )
        show = [programs["sacctmgr"], "--noheader", "show", "cluster"]
        _wait(lambda: self._answers(show), deadline, lambda: f"slurmdbd: {self._log('slurmdbd')}")
        for command in accounting.registrations(programs, layout, self.spec):
            self.run(*command)

    def _start(self, name: str, argv: Sequence[str], extra_env: Mapping[str, str] | None = None) -> None:
        state = self._up_state()
        env = {**packages.clean_environ(), **self.env, processes.MARK: state.token, **(extra_env or {})}
        log = self.root / "log" / f"{name}.out"
        record, child = processes.start(name, argv, env=env, log=log, cwd=self.root)
        self._children.append(child)
        state.processes.append(record)
        state.commands[name] = list(argv)
        state.save(self.root)

    # ---- daemons one by one (faults for tests) --------------------------------------------------

    def stop_daemon(self, name: str, *, term_s: float = 0.0) -> None:
        """End one daemon (`slurmd-NODE`, `slurmctld`, ...): by SIGKILL, or first `term_s` of SIGTERM."""
        if processes.stop([self._up_state().record(name)], term_s=term_s):
            raise DevClusterError(f"{name} does not end")

    def start_daemon(self, name: str) -> None:
        """Start a stopped daemon again with the same command."""
        state = self._up_state()
        if state.record(name).alive():
            raise DevClusterError(f"{name} is running")
        self._start(name, state.commands[name])

    def _up_state(self) -> State:
        if self._state is None:
            raise DevClusterError(
                f"no devcluster in {self.root}; `hpc-rl devcluster up --dir {self.root}` starts one"
            )
        return self._state

    # ---- status --------------------------------------------------

    def status(self) -> Status:
        """Daemons by recorded pid; nodes and jobs as Slurm tells them (none when it does not answer)."""
        state = self._state
        if state is None:
            return Status(self.root, "none", {}, {}, 0)
        daemons = {record.name: record.alive() for record in state.processes}
        nodes: dict[str, str] = {}
        jobs = 0
        if daemons.get("slurmctld"):
            nodes = self._node_states()
            queue = self.run("squeue", "--noheader", "--format=%i", check=False)
            jobs = len(queue.stdout.split())
        word = "down" if not any(daemons.values()) else "up" if all(daemons.values()) and nodes else "broken"
        return Status(self.root, word, daemons, nodes, jobs)

    def _node_states(self) -> dict[str, str]:
        answer = self.run("sinfo", "--noheader", "--Node", "--format=%N %T", check=False)
        lines = [line.split() for line in answer.stdout.splitlines()]
        return {name: node_state for name, node_state in lines}

    def _all_idle(self) -> bool:
        dead = [record for record in self._up_state().processes if not record.alive()]
        if dead:
            raise DevClusterError(f"{dead[0].name} ended: {self._log(dead[0].name)}")
        states = self._node_states()
        return set(states) == set(self._up_state().node_ports) and set(states.values()) == {"idle"}

    def _why_not_idle(self) -> str:
        late = sorted(name for name, node_state in self._node_states().items() if node_state != "idle")
        name = f"slurmd-{late[0]}" if late else "slurmctld"
        return f"nodes {', '.join(late) or 'of slurmctld'}: {self._log(name)}"

    def _log(self, name: str) -> str:
        """What a daemon said last: its own log file where it has one, else its output."""
        own = self.root / "log" / f"{name}.log"
        return processes.tail(own if own.exists() and own.stat().st_size else own.with_suffix(".out"))

    def _answers(self, argv: Sequence[str]) -> bool:
        dead = [record for record in self._up_state().processes if not record.alive()]
        if dead:
            raise DevClusterError(f"{dead[0].name} ended: {self._log(dead[0].name)}")
        return self.run(*argv, check=False).returncode == 0

    # ---- down --------------------------------------------------

    def down(self) -> None:
        """End the jobs, then the daemons, then what they left running; remove the folder. Idempotent."""
        state, on_disk = self._state, State.load(self.root)
        if state is None or on_disk is None or on_disk.token != state.token:
            self._state = None  # somebody else's `down` (and a new `up`) came first
            return
        alive = {record.name for record in state.processes if record.alive()}
        if "slurmctld" in alive:
            try:
                self.cancel_all()
            except DevClusterError as error:
                # Not worth more than a word: whatever still runs is killed next.
                _log.warning("devcluster: %s", error)
        daemons = list(state.processes)
        left = processes.stop([d for d in daemons if d.name.startswith(("slurmd-", "slurmctld"))], term_s=3)
        left += processes.stop(
            processes.left_by(state.token, self.env, state.node_ports, state.processes), term_s=0
        )
        left += processes.stop(
            [d for d in daemons if not d.name.startswith(("slurmd-", "slurmctld"))], term_s=5
        )
        for child in self._children:
            child.poll()
        if left:
            names = ", ".join(f"{record.name} (pid {record.pid})" for record in left)
            raise DevClusterError(f"these processes of the devcluster do not end: {names}")
        self._remove(state)

    def cancel_all(self, timeout_s: float | None = None) -> None:
        """Cancel every job and wait until none is left. Raises DevClusterError naming those that stay.

        The default limit is KillWait and a little.
        """
        deadline = time.monotonic() + (self.spec.kill_wait_s + 5 if timeout_s is None else timeout_s)
        for word in ("PENDING", "SUSPENDED", "RUNNING"):
            self.run("scancel", "--quiet", f"--state={word}", timeout_s=10)
        while left := self.run("squeue", "--noheader", "--format=%i", timeout_s=10).stdout.split():
            if time.monotonic() > deadline:
                raise DevClusterError(f"jobs {', '.join(left)} do not end")
            time.sleep(0.1)

    def _remove(self, state: State) -> None:
        """Remove every file; the state file goes last, so that an interrupted `down` can be repeated."""
        for entry in self.root.iterdir():
            if entry.name == FILE:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        (self.root / FILE).unlink()
        if state.made_dir:
            self.root.rmdir()
        self._state = None
        self._children.clear()


def _wait(ready: Callable[[], bool], deadline: float, waiting_for: Callable[[], str]) -> None:
    while not ready():
        if time.monotonic() > deadline:
            raise DevClusterError(f"devcluster: gave up waiting for {waiting_for()}")
        time.sleep(0.05)
