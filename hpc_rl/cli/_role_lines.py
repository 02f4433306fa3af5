"""What each role process of an attempt does: from the events, made precise by live heartbeats."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc_rl.run.events import REPLICA_ROLES
from hpc_rl.run.paths import RunDir

# The end of a lost replica's process, which says why it was lost, is recorded this soon before or after.
_SAME_LOSS_S = 10.0
_ORDER = {"controller": 0, "policy": 1, "rollout": 2, "reward": 3, "teacher": 4}
_TIMES = {1: "once", 2: "twice"}


@dataclass
class RoleLine:
    """One role process: `state` is a phase (`step`, `generate`, …), `running`, `exited N` or `lost`.

    `since` is when it came into that state. `lost` has a cause for each time that it was lost.
    """

    role: str
    index: int
    state: str
    since: float | None = None
    detail: str = ""
    incarnation: int = 1
    lost: list[str] = field(default_factory=list)

    def words(self) -> str:
        """The detail, and what the process went through before."""
        if not self.lost or self.state == "lost":
            return self.detail
        count = len(self.lost)
        times = _TIMES.get(count, f"{count} times")
        history = f"incarnation {self.incarnation}, lost {times}: {self.lost[-1]}"
        return f"{self.detail}; {history}" if self.detail else history


class _Lines:
    """Role lines built up event by event."""

    def __init__(self) -> None:
        self.lines: dict[tuple[str, int], RoleLine] = {}
        self._failures: dict[tuple[str, int], tuple[float, str]] = {}  # of replicas: the latest
        self._losses: dict[tuple[str, int], float] = {}

    def enter(self, role: str, index: int, state: str, when: float | None, detail: str = "") -> RoleLine:
        line = self.lines.setdefault((role, index), RoleLine(role, index, state))
        line.state, line.since, line.detail = state, when, detail
        return line

    def read(self, event: Mapping[str, Any]) -> None:
        role, index, when = event.get("role"), int(event.get("index", 0)), float(event.get("time", 0.0))
        cause = str(event.get("cause", ""))
        match event.get("kind"):
            case "replica_lost":
                self._lose(role or "rollout", index, when, cause)
            case "step_launched" if role:
                line = self.enter(role, index, "running", when)
                line.incarnation = int(event.get("incarnation", 1))
            case "step_started" if role:
                self.enter(role, index, "running", when)
            case "step_exited" if role:
                known = self.lines.get((role, index))
                if known is None or known.state != "lost":
                    self.enter(role, index, exit_words(int(event.get("code", 0))), when)
            case "failure" if role:
                self._fail(role, index, when, cause)

    def _lose(self, role: str, index: int, when: float, cause: str) -> None:
        failed_at, failure = self._failures.pop((role, index), (0.0, ""))
        if when - failed_at < _SAME_LOSS_S:
            cause = failure
        self._losses[role, index] = when
        self.enter(role, index, "lost", when, cause).lost.append(cause)

    def _fail(self, role: str, index: int, when: float, cause: str) -> None:
        if role in REPLICA_ROLES and when - self._losses.pop((role, index), 0.0) < _SAME_LOSS_S:
            line = self.lines[role, index]  # it was lost by a symptom, and this is why
            line.lost[-1] = cause
            line.detail = cause if line.state == "lost" else line.detail
            return
        if role in REPLICA_ROLES:
            self._failures[role, index] = (when, cause)
        self.enter(role, index, "failed", when, cause)

    def beat(self, role: str, index: int, beat: Mapping[str, Any]) -> None:
        incarnation = int(beat.get("incarnation", 1))
        known = self.lines.get((role, index))
        if known is not None and incarnation < known.incarnation:
            return  # the last one of a process that is gone
        detail = f"step {beat['step']}" if beat.get("step") else ""
        line = self.enter(role, index, str(beat.get("phase", "")), beat.get("phase_since"), detail)
        line.incarnation = incarnation


def role_lines(
    run: RunDir,
    attempt: int,
    events: Sequence[Mapping[str, Any]],
    *,
    live: bool,
    ended: bool = False,
    end: float | None = None,
) -> list[RoleLine]:
    """One line per role process. `ended`: the run is over, at `end` if anybody could note it."""
    found = _Lines()
    for event in events:
        if event.get("attempt") == attempt:
            found.read(event)
    for (role, index), beat in _heartbeats(run, attempt).items() if live else ():
        found.beat(role, index, beat)
    lines = list(found.lines.values())
    for line in lines:
        if ended and line.state == "running":  # nobody was left to write how the step ended
            line.state, line.since = "ended with the run", end
    return sorted(lines, key=lambda line: (_ORDER.get(line.role, 9), line.role, line.index))


def exit_words(code: int) -> str:
    """`exited 1`, or `killed by SIGKILL` for 137."""
    if code > 128:
        try:
            return f"killed by {signal.Signals(code - 128).name}"
        except ValueError:
            pass  # no such signal: an exit code of the program's own
    return f"exited {code}"


def _heartbeats(run: RunDir, attempt: int) -> dict[tuple[str, int], dict[str, Any]]:
    """What the processes say on the bus; nothing if it cannot be reached from this machine in 2 s."""
    path = run.bus_file(attempt)
    if not path.is_file():
        return {}
    from hpc_rl.bus.client import Bus
    from hpc_rl.bus.errors import BusError

    try:
        bus = Bus.connect(path, 2.0, reconnect_s=1.0)
    except (BusError, OSError):
        return {}
    try:
        return bus.heartbeats()
    except BusError:
        return {}
    finally:
        bus.close()
