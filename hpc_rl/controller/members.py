"""Who runs: policy ranks, rollout replicas and those that serve models; their liveness and their restarts.

The controller says what should run (`StartRole`), the supervisor starts it (`StepStarted`, `StepExited`),
the processes say how they are (`Register`, `ReplicaReady`, heartbeats). A replica that is lost is
started again with the next incarnation while its budget lasts; then the run goes on with fewer. The
policy is one step for all its ranks: losing a rank ends the attempt.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc_rl.bus.messages import Message, Register, RoleFailed, StartRole, StepExited, StopRole
from hpc_rl.run.process import describe_exit

LOG = logging.getLogger("hpc_rl.controller")
HEARTBEAT_LIMIT_S = 40.0
START_LIMIT_S = 900.0
REPLICA_RESTARTS = 2
RECOVERED_S = 600.0  # what served so long has its restarts back
LOST_GRACE_S = 2.0


class AttemptFailed(RuntimeError):
    """The attempt cannot go on; the message is the first cause as far as the controller knows it."""


@dataclass
class Replica:
    """One process as the controller sees it: a rollout engine, of which `version` is the last one that it
    acknowledged, or a process of a group that serves models (`role`), which has no versions."""

    index: int
    incarnation: int = 1
    state: str = "starting"  # starting | loaded | live | lost | stopped
    version: int | None = None
    since: float = field(default_factory=time.monotonic)
    receiving: bool = False
    restarts: int = 0
    causes: list[str] = field(default_factory=list)
    lost_at: dict[int, float] = field(default_factory=dict)  # by incarnation, seconds since the epoch
    role: str = "rollout"

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    @property
    def lasted(self) -> float:
        """Seconds in its present state."""
        return time.monotonic() - self.since

    def enter(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()


class Members:
    """All processes of the attempt.

    `scoring` says how many processes each of the groups that serve models has. `send` writes to the
    supervisor; `on_lost(replica)` is called once per loss, before a restart is decided, so that its prompts
    are handed out again.
    """

    def __init__(
        self,
        *,
        world_size: int,
        replicas: int,
        send: Callable[[Message], None],
        on_lost: Callable[[Replica], None],
        scoring: Mapping[str, int] | None = None,
    ) -> None:
        self.world_size = world_size
        self.replicas = {index: Replica(index) for index in range(replicas)}
        self.scoring = {
            (role, index): Replica(index, role=role)
            for role, count in (scoring or {}).items()
            for index in range(count)
        }
        self.policy_ranks: set[int] = set()
        self.policy_started = time.monotonic()
        self.stopping = False
        self._send, self._on_lost = send, on_lost
        self._failures: dict[tuple[str, int, int], RoleFailed] = {}

    def start_all(self) -> None:
        if self.world_size:
            self._send(StartRole("policy", 0, 1))
        for replica in self.everyone():  # those that serve models last: the first prompts take a while
            self._send(StartRole(replica.role, replica.index, replica.incarnation))

    def everyone(self) -> list[Replica]:
        """The rollout replicas, then the processes of the groups that serve models."""
        return [*self.replicas.values(), *self.scoring.values()]

    # --- what the processes and the supervisor say ------------------------------------------------
    def registered(self, message: Register) -> None:
        LOG.info("%s %d registered (pid %d on %s)", message.role, message.index, message.pid, message.node)

    def failed(self, message: RoleFailed) -> None:
        """Keep the cause; the exit of the step follows and decides."""
        self._failures[(message.role, message.index, message.incarnation)] = message
        LOG.error("%s %d failed in phase %s: %s", message.role, message.index, message.phase, message.cause)

    def exited(self, message: StepExited) -> None:
        """A step ended. Raises AttemptFailed for the policy; a replica is restarted or dropped."""
        if self.stopping:
            return
        if message.role == "policy":
            raise AttemptFailed(f"the policy step ended with code {message.code}{self._policy_cause()}")
        replica = self._of(message.role, message.index)
        if replica is None:
            return
        if message.incarnation in replica.lost_at:
            self._explain(replica, message)
            return
        if replica.incarnation != message.incarnation:
            return
        failure = self._failures.get((message.role, message.index, message.incarnation))
        cause = failure.cause if failure else f"its step ended with {describe_exit(message.code)}"
        self.lose(replica, cause)

    def _explain(self, replica: Replica, message: StepExited) -> None:
        """A replica was lost by a symptom and its step's end says why: a signal that is not from us.

        We have it killed LOST_GRACE_S after SIGTERM; what a signal ended sooner had its own reason.
        """
        sooner = message.time < replica.lost_at[message.incarnation] + LOST_GRACE_S
        if sooner and message.code > 128 and message.code != 128 + signal.SIGTERM:
            words = describe_exit(message.code)
            LOG.error(
                "lost %s (incarnation %d): its step ended with %s", replica.name, message.incarnation, words
            )

    def _policy_cause(self) -> str:
        failures = [f for (role, _, _), f in self._failures.items() if role == "policy"]
        if not failures:
            return " (no rank reported a cause)"
        first = min(failures, key=lambda failure: failure.time)
        return f"; first, rank {first.index} in phase {first.phase}: {first.cause}"

    def lose(self, replica: Replica, cause: str) -> None:
        """Report a lost replica, hand its prompts back, start it again or go on without it."""
        if replica.state in ("lost", "stopped"):
            return
        if replica.role != "rollout" and replica.state == "live" and replica.lasted > RECOVERED_S:
            replica.restarts = 0  # one sample may end it each time; a run has very many
        replica.enter("lost")
        replica.causes.append(cause)
        replica.lost_at[replica.incarnation] = time.time()
        replica.version, replica.receiving = None, False
        LOG.error("lost %s: %s", replica.name, cause)
        self._on_lost(replica)
        self._send(StopRole(replica.role, replica.index, LOST_GRACE_S, f"lost: {cause}", lost=True))
        if replica.restarts < REPLICA_RESTARTS:
            replica.restarts += 1
            replica.incarnation += 1
            replica.enter("starting")
            LOG.warning("starting %s again (%d of %d)", replica.name, replica.restarts, REPLICA_RESTARTS)
            self._send(StartRole(replica.role, replica.index, replica.incarnation))
        elif not any(r.state != "lost" for r in self.everyone() if r.role == replica.role):
            raise AttemptFailed(
                f"all {replica.role} replicas are lost; the last one, {replica.name}: {cause}"
            )

    def _of(self, role: str, index: int) -> Replica | None:
        return self.replicas.get(index) if role == "rollout" else self.scoring.get((role, index))

    def find(self, index: int, incarnation: int, role: str = "rollout") -> Replica | None:
        """The live replica a message speaks of; None for one of an earlier incarnation."""
        replica = self._of(role, index)
        if replica is None or replica.incarnation != incarnation or replica.state in ("lost", "stopped"):
            return None
        return replica

    # --- deadlines --------------------------------------------------------------------------------
    def check(self, heartbeats: dict[tuple[str, int], dict[str, Any]]) -> None:
        """Silent or too slow processes. Raises AttemptFailed naming who was waited for."""
        if self.stopping:
            return
        now = time.monotonic()
        for replica in self.everyone():
            if replica.state in ("lost", "stopped"):
                continue
            beat = heartbeats.get((replica.role, replica.index))
            fault = overdue(beat) if beat and int(beat["incarnation"]) == replica.incarnation else None
            if fault is not None:
                self.lose(replica, fault)
            elif replica.state == "starting" and now - replica.since > START_LIMIT_S:
                self.lose(replica, f"not ready {START_LIMIT_S:.0f} s after its start")
        if len(self.policy_ranks) < self.world_size and now - self.policy_started > START_LIMIT_S:
            missing = sorted(set(range(self.world_size)) - self.policy_ranks)
            raise AttemptFailed(f"policy ranks {missing} not ready {START_LIMIT_S:.0f} s after their start")
        for rank in range(self.world_size):
            beat = heartbeats.get(("policy", rank))
            fault = overdue(beat) if beat else None
            if fault is not None:
                raise AttemptFailed(f"policy rank {rank}: {fault}")


def overdue(beat: dict[str, Any]) -> str | None:
    """What is wrong with a process by its last heartbeat, or None: silent, or too long in one phase."""
    now, phase, limit = time.time(), beat.get("phase"), beat.get("limit_s")
    silence = now - float(beat["time"])
    if silence > HEARTBEAT_LIMIT_S:
        return f"no heartbeat for {silence:.0f} s (phase {phase})"
    if limit is not None and now - float(beat["phase_since"]) > limit:
        return f"in phase {phase} for {now - float(beat['phase_since']):.0f} s (limit {limit:.0f} s)"
    return None
