"""Daemons as recorded processes: each in a session of its own, ended only when it is provably still itself.

A pid alone proves nothing after a wrap-around, so each record holds the process's start time (clock ticks
since boot, field 22 of /proc/PID/stat), which together with the pid names one process until the next boot.
Signals go through a pidfd opened before that check, so that they cannot hit a successor.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.cluster.devcluster.errors import DevClusterError

MARK = "HPC_RL_DEVCLUSTER_TOKEN"  # in the daemons' environment only: how `down` finds their children


@dataclass(frozen=True)
class ProcessRecord:
    """One process: enough to find it again from another process, and to know that it is the same one."""

    name: str
    pid: int
    start_ticks: int
    log: str = ""

    def alive(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks

    def send(self, number: signal.Signals) -> None:
        """Signal this process; nothing happens when it is gone, whoever has its pid now."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return
        finally:
            os.close(handle)


def start_ticks(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None when it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name is in parentheses and may hold spaces and parentheses itself.
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else int(fields[19])


def start(
    name: str, argv: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path
) -> tuple[ProcessRecord, subprocess.Popen[bytes]]:
    """Start a daemon in the foreground of its own session, output to `log`. Raises when it dies at once."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
        )
    ticks = start_ticks(process.pid)
    if ticks is None:
        raise DevClusterError(f"{name} ended at once (exit code {process.wait()}): {tail(log)}")
    return ProcessRecord(name, process.pid, ticks, str(log)), process


def stop(records: Iterable[ProcessRecord], *, term_s: float, kill_s: float = 5.0) -> list[ProcessRecord]:
    """SIGTERM, wait up to `term_s`, SIGKILL, wait up to `kill_s`. Returns those that are still alive."""
    left = [record for record in records if record.alive()]
    for number, deadline_s in ((signal.SIGTERM, term_s), (signal.SIGKILL, kill_s)):
        if number == signal.SIGTERM and term_s <= 0:
            continue
        for record in left:
            record.send(number)
        deadline = time.monotonic() + deadline_s
        while left and time.monotonic() < deadline:
            reap(left)
            left = [record for record in left if record.alive()]
            if left:
                time.sleep(0.02)
    return left


def reap(records: Iterable[ProcessRecord]) -> None:
    """Collect the exit status of those that are children of this process, so that no zombie stays."""
    for record in records:
        try:
            os.waitpid(record.pid, os.WNOHANG)
        except ChildProcessError:
            continue


def processes_with(variables: Mapping[str, str]) -> list[ProcessRecord]:
    """Live processes whose *initial* environment holds all of `variables`; unreadable ones are skipped."""
    wanted = {f"{key}={value}".encode() for key, value in variables.items()}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environ = set((entry / "environ").read_bytes().split(b"\0"))
        except OSError:  # gone meanwhile, or of another user
            continue
        if wanted <= environ:
            ticks = start_ticks(int(entry.name))
            if ticks is not None:
                found.append(ProcessRecord(_command(entry), int(entry.name), ticks))
    return found


def left_by(
    token: str, env: Mapping[str, str], nodes: Iterable[str], recorded: Iterable[ProcessRecord]
) -> list[ProcessRecord]:
    """slurmstepds of our daemons (they inherit the mark) and what the jobs left running on the nodes.

    A shell of the user's that merely has SLURM_CONF set has neither the mark nor a SLURMD_NODENAME.
    """
    found = processes_with({MARK: token})
    for node in nodes:
        found += processes_with({**env, "SLURMD_NODENAME": node})
    known = {(record.pid, record.start_ticks) for record in recorded}
    return [record for record in found if (record.pid, record.start_ticks) not in known]


def _command(entry: Path) -> str:
    try:
        return (entry / "comm").read_text().strip()
    except OSError:
        return "?"


def tail(path: Path, lines: int = 8) -> str:
    """The last lines of a log, for an error message."""
    try:
        text = path.read_text(errors="replace").strip().splitlines()
    except FileNotFoundError:
        return f"{path} was not written"
    return " | ".join(text[-lines:]) or f"{path} is empty"
