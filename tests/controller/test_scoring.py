"""The groups that serve models as the controller sees them: losses, restarts, and who is told."""

from __future__ import annotations

import time

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.controller.members import HEARTBEAT_LIMIT_S, RECOVERED_S, REPLICA_RESTARTS, AttemptFailed, Members
from hpc_rl.controller.scoring import ScoringGroups


class World:
    """One rollout replica, two processes of `reward` and one teacher."""

    def __init__(self) -> None:
        self.to_supervisor: list[m.Message] = []
        self.told: list[tuple[str, m.Message]] = []
        self.members = Members(
            world_size=1,
            replicas=1,
            send=self.to_supervisor.append,
            on_lost=lambda replica: self.scoring.changed(replica.role),
            scoring={"reward": 2, "teacher": 1},
        )
        self.scoring = ScoringGroups(
            self.members, lambda stream, message: self.told.append((stream, message))
        )

    def last(self, role: str) -> list[tuple[int, int]]:
        """Who of `role` serves, as the replica was told last."""
        told = [x for stream, x in self.told if stream == m.answers(0, 1) and isinstance(x, m.ScoringMembers)]
        return next(message.live for message in reversed(told) if message.role == role)

    def exit(self, role: str, index: int, incarnation: int) -> None:
        self.members.exited(m.StepExited(role, index, incarnation, 137, time.time()))


def test_all_are_started_and_replicas_are_told_who_serves() -> None:
    world = World()
    world.members.start_all()
    assert world.to_supervisor == [
        m.StartRole("policy", 0, 1), m.StartRole("rollout", 0, 1), m.StartRole("reward", 0, 1),
        m.StartRole("reward", 1, 1), m.StartRole("teacher", 0, 1),
    ]  # fmt: skip
    world.scoring.introduce(world.members.replicas[0])
    assert world.last("reward") == world.last("teacher") == []
    world.scoring.ready(m.ScoringReady("reward", 1, 1))
    world.scoring.ready(m.ScoringReady("teacher", 0, 1))
    assert (world.last("reward"), world.last("teacher")) == ([(1, 1)], [(0, 1)])
    world.scoring.ready(m.ScoringReady("reward", 0, 7))  # of no incarnation that there is
    assert world.last("reward") == [(1, 1)]


def test_a_lost_one_is_started_again_and_serves_with_its_next_incarnation() -> None:
    world = World()
    for index in (0, 1):
        world.scoring.ready(m.ScoringReady("reward", index, 1))
    world.exit("reward", 1, 1)
    assert world.last("reward") == [(0, 1)]
    assert world.to_supervisor[-1] == m.StartRole("reward", 1, 2)
    world.scoring.ready(m.ScoringReady("reward", 1, 1))  # its last word, come late
    assert world.last("reward") == [(0, 1)]
    world.scoring.ready(m.ScoringReady("reward", 1, 2))
    assert world.last("reward") == [(0, 1), (1, 2)]


def test_a_hang_in_a_batch_is_a_loss() -> None:
    world = World()
    world.scoring.ready(m.ScoringReady("teacher", 0, 1))
    now = time.time()
    beat = {"time": now, "phase": "score", "phase_since": now - 31, "limit_s": 30.0, "incarnation": 1}
    world.members.check({("teacher", 0): beat})
    assert world.members.scoring["teacher", 0].causes == ["in phase score for 31 s (limit 30 s)"]
    assert world.last("teacher") == []
    silent = {**beat, "time": now - HEARTBEAT_LIMIT_S - 5, "phase": "idle", "limit_s": None, "incarnation": 2}
    world.members.check({("teacher", 0): silent})
    assert world.members.scoring["teacher", 0].incarnation == 3


def test_the_run_goes_on_with_fewer_and_ends_without_any() -> None:
    world = World()
    for incarnation in range(1, REPLICA_RESTARTS + 2):
        world.exit("reward", 0, incarnation)
    assert world.members.scoring["reward", 0].state == "lost"
    with pytest.raises(AttemptFailed, match="all reward replicas are lost; the last one, reward 1: its step"):
        for incarnation in range(1, REPLICA_RESTARTS + 2):
            world.exit("reward", 1, incarnation)


def test_what_has_served_for_long_has_its_restarts_back() -> None:
    world = World()
    teacher = world.members.scoring["teacher", 0]
    for incarnation in range(1, 3 * REPLICA_RESTARTS):
        world.scoring.ready(m.ScoringReady("teacher", 0, incarnation))
        teacher.since -= RECOVERED_S + 1
        world.exit("teacher", 0, incarnation)
    assert teacher.state == "starting"
    assert teacher.restarts == 1
