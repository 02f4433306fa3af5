"""Who gets the next prompt group, and how many a replica may have."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from hpc_rl.controller.dispatch import Dispatcher
from hpc_rl.controller.members import Members
from hpc_rl.controller.pace import START, InFlightLimit
from hpc_rl.controller.shares import Share
from hpc_rl.types import EngineLoad


def make(replicas: int, limit: int | None = None) -> tuple[Members, Dispatcher]:
    members = Members(world_size=1, replicas=replicas, send=lambda _: None, on_lost=lambda _: None)
    for replica in members.replicas.values():
        replica.version = 0
        replica.enter("live")
    return members, Dispatcher(members, limit)


def give(dispatch: Dispatcher, count: int) -> list[int]:
    """Hand out at most `count` groups to whoever comes first."""
    given = []
    for replica in dispatch.candidates():
        if len(given) == count:
            break
        dispatch.began(replica.index)
        given.append(replica.index)
    return given


def test_the_least_loaded_replica_with_the_newest_weights_comes_first() -> None:
    members, dispatch = make(3, limit=2)
    members.replicas[1].version = 5
    members.replicas[2].receiving = True
    assert give(dispatch, 9) == [1, 0, 1, 0], "two each, none for one that receives weights"
    members.replicas[2].receiving = False
    dispatch.changed()
    dispatch.ended(0)
    assert give(dispatch, 9) == [2, 0, 2]
    dispatch.lost(1)
    members.replicas[1].enter("lost")
    assert give(dispatch, 9) == []


def test_one_that_may_get_nothing_does_not_keep_others_from_it() -> None:
    members, dispatch = make(3, limit=1)
    members.replicas[0].version = members.replicas[1].version = 1
    seen = []
    for replica in dispatch.candidates():
        seen.append(replica.index)
        if replica.index != 0:
            dispatch.began(replica.index)
    assert seen == [0, 1, 2]
    assert [replica.index for replica in dispatch.candidates()] == [0], "it was only put aside"


def test_it_is_right_under_random_events() -> None:
    """The heap, with entries overtaken and rebuilt, against the plain minimum."""
    rng = random.Random(0)
    members, dispatch = make(20, limit=3)
    for _ in range(3000):
        replica = members.replicas[rng.randrange(20)]
        event = rng.random()
        if event < 0.45 and dispatch.loads[replica.index]:
            dispatch.ended(replica.index)
        elif event < 0.5:
            replica.receiving = not replica.receiving
            dispatch.changed()
        elif event < 0.6 and not replica.receiving:
            replica.version = (replica.version or 0) + 1
            dispatch.changed()
        open_ones = [
            (dispatch.loads[r.index], -(r.version or 0), r.index)
            for r in members.replicas.values()
            if not r.receiving and dispatch.loads[r.index] < 3
        ]
        assert give(dispatch, 1) == ([min(open_ones)[2]] if open_ones else [])


def test_a_thousand_replicas_cost_microseconds_each() -> None:
    """Many thousand hand-outs and answers; a search through all replicas at each would take minutes."""
    _, dispatch = make(1000)
    begun = time.process_time()
    for _ in range(3):
        given = Counter(give(dispatch, 1000 * int(START)))
        assert set(given.values()) == {int(START)}
        for index, groups in given.items():
            for _ in range(groups):
                dispatch.ended(index)
    assert time.process_time() - begun < 10


class Engine:
    """Holds `places` answers at once; more wait. `kv` is what one answer takes of the cache."""

    def __init__(self, places: int, kv: float = 0.0) -> None:
        self.places, self.kv = places, kv

    def load(self, groups: int, group_size: int) -> EngineLoad:
        answers = groups * group_size
        running = min(answers, self.places)
        return EngineLoad(running, answers - running, min(1.0, running * self.kv))


@pytest.mark.parametrize(
    ("engine", "low", "high"),
    [
        (Engine(256), 32, 37),  # 32 groups of 8, and a queue of an eighth
        (Engine(8), 1, 3),  # one runs and one waits; a third is too many
        (Engine(10_000, kv=1 / 800), 84, 96),  # the cache is the bound: 85 % is 85 groups
        (Engine(1), 1, 2),
    ],
)
def test_the_limit_finds_the_width_of_the_engine(engine: Engine, low: int, high: int) -> None:
    limit, seen = InFlightLimit(), []
    for answer in range(4000):
        limit.answered(engine.load(limit.groups, 8), 8, limit.groups)
        if answer > 1000:
            seen.append(limit.groups)
    mean = sum(seen) / len(seen)
    assert low * 0.75 <= min(seen) and max(seen) <= high + 1, (min(seen), max(seen))
    assert low * 0.85 <= mean <= high


def test_the_limit_grows_only_where_it_binds_and_shrinks_at_once_when_answers_are_put_back() -> None:
    limit = InFlightLimit()
    for _ in range(100):
        limit.answered(EngineLoad(running=16), 8, in_flight=2)
    assert limit.groups == START, "two groups in flight say nothing of nine"
    for _ in range(100 - int(START)):
        limit.answered(EngineLoad(running=800), 8, in_flight=limit.groups)
    assert limit.groups == 100
    limit.answered(EngineLoad(running=800, preempted=1), 8, in_flight=100)
    assert limit.groups == 75
    limit.answered(EngineLoad(running=800, preempted=2), 8, in_flight=100)
    assert limit.groups == 75, "what is in flight goes on pressing: one cut for all of it"
    fixed = InFlightLimit(3)
    fixed.answered(EngineLoad(waiting=100), 8, in_flight=3)
    assert fixed.groups == 3


def test_shares_of_time() -> None:
    now = [0.0]
    share = Share(lambda: now[0])
    for value, seconds in ((1.0, 1.0), (0.25, 2.0), (0.0, 1.0)):
        now[0] += seconds
        share.add(value)
    assert share.take() == 1.5 / 4
    now[0] += 1
    share.add(0.5)
    assert share.take() == 0.5
