"""What Slurm says about jobs, parsed: squeue, scontrol and sacct of versions 20.11 to 25.x.

No `--json`: squeue, scontrol and sacct got it in different versions, and its shape changed twice.
The formats asked for here (`squeue -o`, `scontrol -o`, `sacct -P`) have not changed in that time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

State = Literal["PENDING", "RUNNING", "REQUEUED", "COMPLETED", "FAILED", "CANCELLED"]

SQUEUE_FORMAT = "%i|%A|%T|%r|%N|%S|%L|%j|%k"
SACCT_FORMAT = "JobID,JobIDRaw,State,NodeList,ExitCode,JobName"

_PENDING = {"PENDING", "CONFIGURING", "RESV_DEL_HOLD"}
_RUNNING = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_REQUEUED = {"REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
_CANCELLED = {"CANCELLED", "REVOKED"}
_HET_ID = re.compile(r"^(\d+)\+(\d+)$")
_DURATION = re.compile(r"^(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)$")

_REASONS = {
    "None": "the scheduler has not looked at it yet (het jobs wait for the next backfill pass)",
    "Priority": "jobs of higher priority are ahead",
    "Resources": "waiting for nodes to become free",
    "BeginTime": "waiting for its start time (Slurm holds a requeued job back for about two minutes)",
    "Dependency": "waiting for the job it depends on",
    "DependencyNeverSatisfied": "the job it depends on failed: this one will never start; cancel it",
    "JobHeldUser": "held by you; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionConfig": "the partition can never give these nodes; lower the request or choose another",
    "PartitionNodeLimit": "more nodes than the partition allows; it will never start as it is",
    "PartitionTimeLimit": "a longer time than the partition allows; it will never start as it is",
    "BadConstraints": "no node has the features asked for; it will never start as it is",
    "ReqNodeNotAvail": "nodes it needs are down, drained or reserved for maintenance",
    "Reservation": "waiting for its reservation",
    "Licenses": "waiting for licences",
    "NodeDown": "a node it needs is down",
    "InvalidAccount": "the account is not valid here; set `cluster.policy.account`",
    "InvalidQOS": "the qos is not valid here; set `cluster.policy.qos`",
    "launch failed requeued held": "its launch failed and Slurm holds it; `scontrol release` tries again",
}


@dataclass(frozen=True)
class Component:
    """One component of a job, as Slurm sees it. `nodes` is Slurm's node list (`tr[1-2]`), "" if none yet."""

    id: str
    index: int
    name: str
    slurm_state: str
    state: State
    reason: str = ""
    nodes: str = ""
    start: str = ""  # a pending component: the scheduler's estimate; ISO, "" if none
    time_left_s: int | None = None
    exit_code: str = ""  # "code:signal"
    comment: str = ""

    @property
    def why(self) -> str:
        """Why it is not running, in words; "" unless pending."""
        return explain(self.reason) if self.state in ("PENDING", "REQUEUED") else ""


@dataclass(frozen=True)
class JobState:
    """A job over all its components. `state` is that of the leader, whose batch step is the supervisor."""

    id: str
    state: State
    components: tuple[Component, ...]
    source: Literal["squeue", "scontrol", "sacct"]
    restarts: int = 0

    @property
    def why(self) -> str:
        """Why the job is not running, one part per pending component; "" if none is pending."""
        pending = [c for c in self.components if c.why]
        if len({c.why for c in pending}) == 1:
            return pending[0].why
        return "; ".join(f"{c.name}: {c.why}" for c in pending)

    @property
    def start(self) -> str:
        """The scheduler's latest estimate over the components, ISO; "" if one has none."""
        starts = [c.start for c in self.components if c.state in ("PENDING", "REQUEUED")]
        return max(starts) if starts and all(starts) else ""

    @property
    def final(self) -> bool:
        return self.state in ("COMPLETED", "FAILED", "CANCELLED")


def state_of(slurm_state: str) -> State:
    """Our word for one of Slurm's job states. Unknown final states count as FAILED."""
    words = slurm_state.replace("+", " ").split()
    word = words[0] if words else ""
    if word in _PENDING:
        return "PENDING"
    if word in _RUNNING:
        return "RUNNING"
    if word in _REQUEUED:
        return "REQUEUED"
    if word in _CANCELLED:
        return "CANCELLED"
    return "COMPLETED" if word == "COMPLETED" else "FAILED"


def explain(reason: str) -> str:
    """A pending reason of Slurm's in words, with Slurm's own word where it says more."""
    reason = reason.strip("()")
    word = reason.split(",")[0].strip()
    if word in _REASONS:
        extra = reason[len(word) :].lstrip(",").strip()
        return f"{_REASONS[word]} ({extra})" if extra else _REASONS[word]
    if word.startswith(("QOS", "Assoc")) or "Limit" in word:
        return f"a limit of your account or qos is reached ({word})"
    return f"Slurm says {reason}" if reason else _REASONS["None"]


def seconds(duration: str) -> int | None:
    """Slurm's `[D-][HH:]MM:SS` in seconds; None for UNLIMITED, INVALID and the like."""
    match = _DURATION.match(duration.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def parse_squeue(text: str) -> dict[str, JobState]:
    """`squeue -h -t all -o SQUEUE_FORMAT` as jobs by leader id."""
    found: dict[str, list[Component]] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 8)
        if len(fields) < 9:
            continue
        shown, raw, state, reason, nodes, start, left, name, comment = fields
        leader, index = _het_id(shown)
        component = Component(
            id=raw,
            index=index,
            name=name,
            slurm_state=state,
            state=state_of(state),
            reason=reason.strip("()"),
            nodes=_value(nodes),
            start=_value(start),
            time_left_s=seconds(left),
            comment=_value(comment),
        )
        found.setdefault(leader, []).append(component)
    return {leader: _job(leader, components, "squeue") for leader, components in found.items()}


def parse_scontrol(text: str) -> dict[str, JobState]:
    """`scontrol -o show job ID` as jobs by leader id."""
    found: dict[str, list[Component]] = {}
    restarts: dict[str, int] = {}
    for line in text.splitlines():
        raw = _field(line, "JobId")
        if not raw:
            continue
        leader = _field(line, "HetJobId") or _field(line, "PackJobId") or raw
        index = _field(line, "HetJobOffset") or _field(line, "PackJobOffset") or "0"
        state = _field(line, "JobState")
        component = Component(
            id=raw,
            index=int(index),
            name=_field(line, "JobName"),
            slurm_state=state,
            state=state_of(state),
            reason=_field(line, "Reason"),
            nodes=_value(_field(line, "NodeList")),
            start=_value(_field(line, "StartTime")),
            exit_code=_field(line, "ExitCode"),
            comment=_value(_field(line, "Comment")),
        )
        found.setdefault(leader, []).append(component)
        restarts[leader] = max(restarts.get(leader, 0), int(_field(line, "Restarts") or 0))
    return {
        leader: _requeued(_job(leader, components, "scontrol"), restarts[leader])
        for leader, components in found.items()
    }


def parse_sacct(text: str) -> dict[str, JobState]:
    """`sacct -n -P -X -o SACCT_FORMAT` by leader id; the last row of a component is its latest attempt."""
    found: dict[str, dict[int, Component]] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 5)
        if len(fields) < 6 or "." in fields[0]:
            continue
        shown, raw, state, nodes, exit_code, name = fields
        leader, index = _het_id(shown)
        found.setdefault(leader, {})[index] = Component(
            id=raw,
            index=index,
            name=name,
            slurm_state=state,
            state=state_of(state),
            nodes="" if nodes == "None assigned" else nodes,
            exit_code=exit_code,
        )
    return {leader: _job(leader, list(components.values()), "sacct") for leader, components in found.items()}


def with_restarts(job: JobState, restarts: int) -> JobState:
    """`job` knowing how often Slurm restarted it: a pending one that has run before is REQUEUED."""
    return _requeued(job, restarts)


def _requeued(job: JobState, restarts: int) -> JobState:
    state = "REQUEUED" if restarts and job.state == "PENDING" else job.state
    return replace(job, restarts=restarts, state=state)


def _job(
    leader: str, components: list[Component], source: Literal["squeue", "scontrol", "sacct"]
) -> JobState:
    components.sort(key=lambda component: component.index)
    state = components[0].state
    # Between two attempts Slurm moves the components one by one: the job waits until all of them run.
    waiting = [c.state for c in components if c.state in ("PENDING", "REQUEUED")]
    if waiting and state == "RUNNING":
        state = waiting[0]
    return JobState(leader, state, tuple(components), source)


def _het_id(shown: str) -> tuple[str, int]:
    """`66+1` -> ("66", 1); `66` -> ("66", 0). Around the start of a het job both forms appear."""
    match = _HET_ID.match(shown)
    return (match.group(1), int(match.group(2))) if match else (shown, 0)


def _field(line: str, name: str) -> str:
    """The value of `name=` in one line of scontrol: up to the next ` Word=`, since values may hold spaces."""
    match = re.search(rf"(?:^|\s){name}=(.*?)(?=\s[A-Za-z][\w:/.-]*=|$)", line)
    return match.group(1).strip() if match else ""


def _value(text: str) -> str:
    return "" if text in ("(null)", "N/A", "Unknown", "None", "n/a") else text
