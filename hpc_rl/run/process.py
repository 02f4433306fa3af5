"""Child processes that cannot outlive their parent, and knowing whether a process still lives."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
# Loaded before any fork: between fork and exec only this plain C call may run.
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(death_signal: int = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn` that has the kernel send `death_signal` to the child when its parent dies.

    The parent is the *thread* that forks, so children must be started from the main thread.
    """
    parent = os.getpid()

    def preexec() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above
            os._exit(128 + death_signal)

    return preexec


def start_ticks(pid: int) -> int | None:
    """When process `pid` of this host started (clock ticks since boot); None if there is none.

    Together with the pid this names a process for good: pids are used again, pairs are not.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    if fields[0] == "Z":
        return None
    return int(fields[19])


def exit_code(returncode: int) -> int:
    """Popen's return code as a shell gives it: 128+n for signal n."""
    return 128 - returncode if returncode < 0 else returncode


def describe_exit(code: int) -> str:
    """`exit code 3`, or `signal 9 (SIGKILL)` for 137."""
    if code > 128:
        try:
            return f"signal {code - 128} ({signal.Signals(code - 128).name})"
        except ValueError:
            return f"exit code {code}"
    return f"exit code {code}"
