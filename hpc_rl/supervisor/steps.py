"""A started role: one or more child processes that live and die as one step."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from hpc_rl.run.process import die_with_parent, exit_code

# How long the other tasks of a step get after one of them failed.
BAD_EXIT_GRACE_S = 5.0


class Step(Protocol):
    """What a launcher started. `logs`: what the launcher and the tasks write, launcher first."""

    role: str
    index: int
    incarnation: int
    argv: list[str]
    logs: list[Path]

    def poll(self) -> int | None:
        """None while anything of it runs, else the exit code (128+n for signal n)."""

    def terminate(self) -> None:
        """SIGTERM to its tasks where they are children; the others hear it on the bus."""

    def kill(self) -> None:
        """SIGKILL to everything of it."""


def spawn(argv: Sequence[str], log: Path, env: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own, in `folder`, that gets SIGTERM when this process dies.

    Only from the main thread (see `die_with_parent`). Raises OSError if it cannot be started.
    """
    with open(log, "ab") as output:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=folder,
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGTERM),
        )


class ProcessStep:
    """A step of child processes: the ranks of a local role, or one `srun`.

    When one ends badly the others are ended too, as `srun --kill-on-bad-exit` does; the first bad
    code is the step's. What a child leaves behind in its process group is killed with it.
    """

    def __init__(
        self,
        role: str,
        index: int,
        incarnation: int,
        argv: list[str],
        logs: list[Path],
        children: list[subprocess.Popen[bytes]],
    ) -> None:
        self.role = role
        self.index = index
        self.incarnation = incarnation
        self.argv = argv
        self.logs = logs
        self._running = list(children)
        self._code = 0
        self._kill_at: float | None = None

    def poll(self) -> int | None:
        for child in list(self._running):
            code = _reap(child)
            if code is None:
                continue
            self._running.remove(child)
            if code != 0 and self._code == 0:
                self._code = code
                self._kill_at = time.monotonic() + BAD_EXIT_GRACE_S
                self.terminate()
        if not self._running:
            return self._code
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self.kill()
        return None

    def terminate(self) -> None:
        for child in self._running:
            child.terminate()

    def kill(self) -> None:
        for child in self._running:
            _kill_group(child.pid)


class SlurmStep(ProcessStep):
    """A step whose only child is its `srun`. When that dies Slurm kills the tasks, without SIGTERM."""

    def terminate(self) -> None:
        pass


def _reap(child: subprocess.Popen[bytes]) -> int | None:
    """The exit code of `child` if it ended; then its whole process group is gone as well."""
    if child.returncode is None:
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        _kill_group(child.pid)  # before it is reaped: until then the number cannot be another's
    return exit_code(child.wait())


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


# A line of the roles' own log that is no complaint (`roles/process.py` sets the format).
_QUIET = re.compile(r"^\d\d:\d\d:\d\d (DEBUG|INFO|WARNING) ")


def last_words(logs: Sequence[Path]) -> str:
    """What the first log that says anything says, for what ended without leaving a cause."""
    for log in logs:
        try:
            with open(log, "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            continue
        words = [line.strip() for line in lines if line.strip() and not _QUIET.match(line)]
        from_srun = [line for line in words if line.startswith("srun: error: ")]
        if from_srun:
            return from_srun[0][:300]  # it names the task that was first; the others follow
        if words:
            return words[-1][:300]
    return ""
