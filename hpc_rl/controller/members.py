"""Who runs: the policy's ranks and the rollout replicas, their liveness, and their restarts.

The controller says what should run (`StartRole`), the supervisor starts it (`StepStarted`, `StepExited`),
the processes say how they are (`Register`, `ReplicaReady`, heartbeats). A replica that is lost is
started again with the next incarnation while its budget lasts; then the run goes on with fewer. The
policy is one step for all its ranks: losing a rank ends the attempt.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hpc_rl.bus.messages import Message, Register, RoleFailed, StartRole, StepExited, StopRole
from hpc_rl.run.process import describe_exit

LOG = logging.getLogger("hpc_rl.controller")
HEARTBEAT_LIMIT_S = 40.0
START_LIMIT_S = 900.0
REPLICA_RESTARTS = 2
LOST_GRACE_S = 2.0


class AttemptFailed(RuntimeError):
    """The attempt cannot go on; the message is the first cause as far as the controller knows it."""


@dataclass
class Replica:
    """One rollout engine as the controller sees it. `version` is the last acknowledged one."""

    index: int
    incarnation: int = 1
    state: str = "starting"  # starting | loaded | live | lost | stopped
    version: int | None = None
    since: float = field(default_factory=time.monotonic)
    receiving: bool = False
    restarts: int = 0
    causes: list[str] = field(default_factory=list)
    lost_at: dict[int, float] = field(default_factory=dict)  # by incarnation, seconds since the epoch

    @property
    def name(self) -> str:
        return f"rollout {self.index}"

    def enter(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()


class Members:
    """All processes of the attempt.

    `send` writes to the supervisor; `on_lost(replica)` is called once per loss, before a restart is
    decided, so that its prompts are handed out again.
    """

    def __init__(
        self,
        *,
        world_size: int,
        replicas: int,
        send: Callable[[Message], None],
        on_lost: Callable[[Replica], None],
    ) -> None:
        self.world_size = world_size
        self.replicas = {index: Replica(index) for index in range(replicas)}
        self.policy_ranks: set[int] = set()
        self.policy_started = time.monotonic()
        self.stopping = False
        self._send, self._on_lost = send, on_lost
        self._failures: dict[tuple[str, int, int], RoleFailed] = {}

    def start_all(self) -> None:
        self._send(StartRole("policy", 0, 1))
        for replica in self.replicas.values():
            self._send(StartRole("rollout", replica.index, replica.incarnation))

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
        replica = self.replicas.get(message.index)
        if message.role != "rollout" or replica is None:
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
        replica.enter("lost")
        replica.causes.append(cause)
        replica.lost_at[replica.incarnation] = time.time()
        replica.version, replica.receiving = None, False
        LOG.error("lost %s: %s", replica.name, cause)
        self._on_lost(replica)
        self._send(StopRole("rollout", replica.index, LOST_GRACE_S, f"lost: {cause}", lost=True))
        if replica.restarts < REPLICA_RESTARTS:
            replica.restarts += 1
            replica.incarnation += 1
            replica.enter("starting")
            LOG.warning("starting %s again (%d of %d)", replica.name, replica.restarts, REPLICA_RESTARTS)
            self._send(StartRole("rollout", replica.index, replica.incarnation))
        elif not any(r.state != "lost" for r in self.replicas.values()):
            raise AttemptFailed(f"all rollout replicas are lost; the last one, {replica.name}: {cause}")

    def find(self, index: int, incarnation: int) -> Replica | None:
        """The live replica a message speaks of; None for one of an earlier incarnation."""
        replica = self.replicas.get(index)
        if replica is None or replica.incarnation != incarnation or replica.state in ("lost", "stopped"):
            return None
        return replica

    # --- deadlines --------------------------------------------------------------------------------
    def check(self, heartbeats: dict[tuple[str, int], dict[str, Any]]) -> None:
        """Silent or too slow processes. Raises AttemptFailed naming who was waited for."""
        if self.stopping:
            return
        now = time.monotonic()
        for replica in list(self.replicas.values()):
            if replica.state in ("lost", "stopped"):
                continue
            beat = heartbeats.get(("rollout", replica.index))
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
