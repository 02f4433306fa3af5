"""Lost replicas, silent processes, failed pushes: who is told, what starts again, what ends the attempt."""

from __future__ import annotations

import time

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.controller.members import (
    HEARTBEAT_LIMIT_S,
    REPLICA_RESTARTS,
    AttemptFailed,
    Members,
    Replica,
    overdue,
)
from hpc_rl.controller.pushes import Pushes


class World:
    """Members with a record of what they said."""

    def __init__(self, replicas: int = 2, world_size: int = 1) -> None:
        self.sent: list[m.Message] = []
        self.lost: list[int] = []
        self.members = Members(
            world_size=world_size,
            replicas=replicas,
            send=self.sent.append,
            on_lost=lambda replica: self.lost.append(replica.index),
        )
        self.to_policy: list[m.Message] = []
        self.to_replica: list[tuple[int, m.Message]] = []
        self.pushes = Pushes(
            self.members,
            to_policy=self.to_policy.append,
            to_replica=lambda index, message: self.to_replica.append((index, message)),
            timeout_s=10.0,
        )

    def replica(self, index: int) -> Replica:
        return self.members.replicas[index]

    def go_live(self) -> None:
        for replica in self.members.replicas.values():
            replica.enter("live")
            replica.version = 0


def exited(index: int, incarnation: int = 1, code: int = 137, role: str = "rollout") -> m.StepExited:
    return m.StepExited(role, index, incarnation, code, time.time())


def test_a_lost_replica_is_started_again_with_the_next_incarnation() -> None:
    world = World()
    world.go_live()
    world.members.exited(exited(1))
    assert world.lost == [1]
    assert world.sent[-1] == m.StartRole("rollout", 1, 2)
    assert world.replica(1).version is None
    world.members.exited(exited(1))  # the same exit of the earlier incarnation says nothing new
    assert world.lost == [1]


@pytest.mark.parametrize(
    ("code", "after_s", "explained"),
    [(137, 0.3, True), (139, 0.3, True), (137, 2.1, False), (143, 0.3, False), (1, 0.3, False)],
)
def test_the_true_cause_of_a_symptom_is_told(
    caplog: pytest.LogCaptureFixture, code: int, after_s: float, explained: bool
) -> None:
    world = World()
    world.go_live()
    world.members.lose(world.replica(1), "push of version 118: Connection closed by peer")
    caplog.clear()
    world.members.exited(m.StepExited("rollout", 1, 1, code, time.time() + after_s))
    assert ("lost rollout 1 (incarnation 1): its step ended with signal" in caplog.text) == explained
    assert world.lost == [1]


def test_a_replica_beyond_its_budget_is_dropped_and_the_last_one_ends_the_attempt() -> None:
    world = World()
    world.go_live()
    for incarnation in range(1, REPLICA_RESTARTS + 2):
        world.members.exited(exited(1, incarnation))
    assert world.replica(1).state == "lost"
    with pytest.raises(AttemptFailed, match="all rollout replicas are lost"):
        for incarnation in range(1, REPLICA_RESTARTS + 2):
            world.members.exited(exited(0, incarnation))


def test_the_first_cause_of_a_policy_failure_is_named() -> None:
    world = World(world_size=2)
    for rank, when in ((1, 20.0), (0, 10.0)):
        world.members.failed(m.RoleFailed("policy", rank, 1, when, "step", f"cause of {rank}"))
    with pytest.raises(AttemptFailed, match="rank 0 in phase step: cause of 0"):
        world.members.exited(exited(0, code=1, role="policy"))


def test_exits_after_stop_are_the_end_and_not_a_loss() -> None:
    world = World()
    world.go_live()
    world.members.stopping = True
    world.members.exited(exited(0, code=0))
    world.members.exited(exited(0, code=0, role="policy"))
    assert world.lost == []


def beat(age: float = 0.0, limit: float | None = None, since: float = 0.0) -> dict:
    now = time.time()
    return {
        "time": now - age,
        "phase": "load",
        "phase_since": now - since,
        "limit_s": limit,
        "incarnation": 1,
    }


def test_silence_and_a_phase_beyond_its_limit_are_faults() -> None:
    assert overdue(beat()) is None
    assert overdue(beat(limit=60, since=59)) is None
    assert "no heartbeat" in (overdue(beat(age=HEARTBEAT_LIMIT_S + 5)) or "")
    assert "in phase load for 61 s (limit 60 s)" in (overdue(beat(limit=60, since=61)) or "")


def test_a_silent_policy_rank_ends_the_attempt_a_silent_replica_does_not() -> None:
    world = World()
    world.go_live()
    world.members.policy_ranks.add(0)
    silent = beat(age=HEARTBEAT_LIMIT_S + 1)
    world.members.check({("rollout", 0): silent, ("policy", 0): beat()})
    assert world.lost == [0]
    with pytest.raises(AttemptFailed, match="policy rank 0: no heartbeat"):
        world.members.check({("policy", 0): silent})


def test_a_heartbeat_of_an_earlier_incarnation_does_not_count() -> None:
    world = World()
    world.go_live()
    world.members.exited(exited(0))
    world.members.check({("rollout", 0): beat(age=HEARTBEAT_LIMIT_S + 1)})
    assert world.lost == [0]


def test_a_version_counts_only_when_acknowledged() -> None:
    world = World()
    world.go_live()
    world.pushes.begin(3, world.pushes.behind(3))
    assert world.to_policy == [m.PushWeights(3, [0, 1], [1, 1])]
    assert [message for _, message in world.to_replica] == [m.ReceiveWeights(3)] * 2
    world.pushes.applied(m.WeightsApplied(0, 1, 3, tensors=9))
    assert (world.replica(0).version, world.replica(1).version) == (3, 0)
    world.pushes.reported(m.WeightsPushed(3, 0.1, 100))
    assert world.pushes.under_way == 3, "replica 1 has not answered yet"
    world.pushes.applied(m.WeightsApplied(1, 1, 3, tensors=9))
    assert world.pushes.under_way is None


def test_a_replica_that_did_not_get_the_weights_is_lost_and_the_push_ends() -> None:
    world = World()
    world.go_live()
    world.pushes.begin(1, world.pushes.behind(1))
    world.pushes.applied(m.WeightsApplied(0, 1, 1, tensors=9))
    world.pushes.reported(m.WeightsPushed(1, 0.1, 100, failed={"1": "no answer for 10 s"}))
    assert world.lost == [1]
    assert world.pushes.under_way is None
    assert world.replica(1).incarnation == 2
    # The late acknowledgement of the lost incarnation changes nothing.
    world.pushes.applied(m.WeightsApplied(1, 1, 1, tensors=9))
    assert world.replica(1).version is None
