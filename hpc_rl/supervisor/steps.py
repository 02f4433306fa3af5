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

from hpc_rl.run.process import describe_exit, die_with_parent, exit_code
from hpc_rl.run.secrets import mask

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


# Lines of the roles' own log (`roles/process.py` sets the format) and of vLLM's that are no complaint.
_QUIET = re.compile(r"^(\(.*?\) )?(\d\d:\d\d:\d\d )?(DEBUG|INFO|WARNING)\b")
_COMPLAINT = re.compile(
    r"error|exception|critical|fatal|traceback|abort|killed|panic|segmentation|out of memory|oom.kill"
    r"|terminate called|not found|no such|cannot|denied|failed",
    re.IGNORECASE,
)
_TAIL_BYTES = 16384


def exit_words(code: int, logs: Sequence[Path], secrets: Sequence[str]) -> str:
    """How a step without a cause of its own ended, with the last error that it wrote; secrets masked."""
    said = mask(last_words(logs, killed=code == 128 + signal.SIGKILL), secrets)
    return f"ended with {describe_exit(code)}" + (f"; its last words: {said}" if said else "")


def last_words(logs: Sequence[Path], *, killed: bool = False) -> str:
    """The last error in the first log that has one, "" if none.

    What was `killed` from outside did not end by an error that it logged and went on from.
    """
    for log in logs:
        errors = _errors(_whole_lines(log), until_the_end=killed)
        from_srun = [line for line in errors if line.startswith("srun: error: ")]
        if from_srun:
            return from_srun[0][:300]  # it names the task that was first; the others follow
        if errors:
            return errors[-1][:300]
    return ""


def _whole_lines(log: Path) -> list[str]:
    """The lines at the end of `log`, without those whose start or end is missing."""
    try:
        with open(log, "rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    return lines[1 if start else 0 : -1]


def _errors(lines: Sequence[str], *, until_the_end: bool) -> list[str]:
    """The complaints among `lines`; a traceback counts with the line that names its exception."""
    found: list[str] = []
    in_traceback = False
    for line in lines:
        if _QUIET.match(line):
            in_traceback = False
            if until_the_end:
                found.clear()
        elif line.startswith("Traceback"):
            in_traceback = True
        elif line.strip() and not line[0].isspace():  # indented: the frames, and details of a complaint
            if in_traceback or (_COMPLAINT.search(line) and "Warning: " not in line):
                found.append(line.strip())
            in_traceback = False
    return found
