"""The prompt window: every prompt once, staleness bounded, whatever the order of events."""

from __future__ import annotations

import doctest
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.controller import window as module
from hpc_rl.controller.oversample import OversampledWindow, cancelled_flights
from hpc_rl.controller.window import NO_SIGNAL, ORDERS, Answer, Chosen, Flight, PromptWindow
from hpc_rl.types import Prompt, PromptGroup, Trajectory, VersionSpan


def make_group(ordinal: int, version: int = 0) -> PromptGroup:
    prompt = Prompt(ordinal=ordinal, epoch=0, row=ordinal, content="x")
    trajectory = Trajectory(
        ordinal=ordinal, sample=0, replica=0, prompt_ids=[1], token_ids=[2], log_probs=[-1.0],
        spans=[VersionSpan(version, 0, 1)], finish="stop",
    )  # fmt: skip
    return PromptGroup(prompt, [trajectory])


def start_all(window: PromptWindow, version: int = 0, replica: int = 0) -> list[int]:
    """Hand out all that a replica at `version` may start."""
    handed = []
    while (ordinal := window.admit(version)) is not None:
        window.hand_out(ordinal, Flight(replica, 1, version))
        handed.append(ordinal)
    return handed


def finish(window: PromptWindow, *ordinals: int) -> None:
    for ordinal in ordinals:
        flight = window.in_flight[ordinal]
        assert window.finish(ordinal, flight.owner, make_group(ordinal, flight.version))


def step(window: PromptWindow) -> list[int]:
    chosen = window.reserve()
    window.commit()
    return [group.prompt.ordinal for group in chosen.groups]


def test_the_example_of_the_docstring() -> None:
    found = doctest.testmod(module, extraglobs={"group": make_group})
    assert (found.failed, found.attempted) == (0, 10)


@pytest.mark.parametrize("order", ORDERS)
def test_admits_up_to_the_staleness_bound_and_no_further(order: str) -> None:
    window = ORDERS[order](prompts_per_step=2, max_staleness=1, total_prompts=10)
    assert start_all(window) == [0, 1, 2, 3]
    finish(window, 0, 1)
    assert step(window) == [0, 1]
    assert window.admit(0) is None
    assert start_all(window, version=1) == [4, 5]


def test_a_long_group_is_waited_for_at_its_deadline_and_not_before() -> None:
    window = PromptWindow(prompts_per_step=2, max_staleness=2, total_prompts=100)

    def start(count: int, version: int) -> None:  # engines with few slots: less than may be started
        for _ in range(count):
            ordinal = window.admit(version)
            assert ordinal is not None
            window.hand_out(ordinal, Flight(0, 1, version))

    start(3, version=0)
    finish(window, 1, 2)
    assert step(window) == [1, 2], "not 0, which is long"
    start(2, version=1)
    finish(window, 4)
    assert not window.ready(), "two are to be trained"
    finish(window, 3)
    assert step(window) == [3, 4]
    start(3, version=2)
    finish(window, 5, 6, 7)
    assert not window.ready(), "step 3 is the last that may train 0"
    finish(window, 0)
    assert step(window) == [0, 5], "earliest deadline first, then the oldest"
    start(1, version=3)
    finish(window, 8)
    assert step(window) == [6, 7]


def test_a_stale_replica_cannot_take_the_place_of_what_a_newer_one_started() -> None:
    window = PromptWindow(prompts_per_step=1, max_staleness=1, total_prompts=100)
    assert start_all(window) == [0, 1]
    finish(window, 0)
    assert step(window) == [0]
    finish(window, 1)
    assert window.admit(1) == 2
    window.hand_out(2, Flight(1, 1, version=1))
    assert window.admit(0) is None, "its deadline, step 2, belongs to 1"
    assert step(window) == [1]
    assert window.admit(0) is None, "it would be born too old"


def test_synchronous_steps_are_consecutive_in_both_orders() -> None:
    for order in ORDERS.values():
        window = order(prompts_per_step=3, max_staleness=0, total_prompts=8)
        for version, expected in enumerate([[0, 1, 2], [3, 4, 5], [6, 7]]):
            assert start_all(window, version) == expected
            finish(window, *reversed(expected[1:]))
            assert not window.ready()
            finish(window, expected[0])
            assert step(window) == expected
        assert window.over and window.steps_taken == window.total_steps == 3


def test_strict_steps_are_consecutive_however_late_one_is() -> None:
    window = ORDERS["strict"](prompts_per_step=2, max_staleness=2, total_prompts=100)
    assert start_all(window) == [0, 1, 2, 3, 4, 5]
    finish(window, 1, 2, 3, 4)
    assert not window.ready()
    finish(window, 0)
    assert (step(window), step(window)) == ([0, 1], [2, 3])


def test_an_answer_from_a_lost_replica_is_ignored_after_its_prompt_went_elsewhere() -> None:
    window = PromptWindow(1, 0, 5)
    window.hand_out(0, Flight(0, 1, 0))
    before = window.in_flight[0].owner
    assert window.give_back(0) == [0]
    assert window.admit(0) == 0
    window.hand_out(0, Flight(0, 1, 0))  # the same process: only the hand-out differs
    assert not window.finish(0, before, make_group(0))
    owner = window.in_flight[0].owner
    assert window.finish(0, owner, make_group(0))
    assert not window.finish(0, owner, make_group(0))
    assert window.ready()


def drop(window: PromptWindow, *ordinals: int) -> None:
    for ordinal in ordinals:
        assert window.drop(ordinal, window.in_flight[ordinal].owner, NO_SIGNAL, make_group(ordinal))


@pytest.mark.parametrize("order", ORDERS)
def test_dropped_groups_are_refilled_up_to_the_bound(order: str) -> None:
    window = ORDERS[order](2, 0, None, total_steps=2, max_refill=1.0)
    assert start_all(window) == [0, 1]
    drop(window, 0)
    assert start_all(window) == [2], "one was dropped, one more is started"
    drop(window, 2)
    assert start_all(window) == [3]
    drop(window, 1)
    assert start_all(window) == [], "two were replaced, which is all that max_refill allows"
    finish(window, 3)
    chosen = window.reserve()
    window.commit()
    assert [g.prompt.ordinal for g in chosen.groups] == [3], "it goes with what it has"
    assert chosen.drops == dict.fromkeys([0, 1, 2], NO_SIGNAL)
    assert [g.prompt.ordinal for g in chosen.dropped_groups] == [0, 1, 2]
    assert chosen.refilled == 2
    assert start_all(window, version=1) == [4, 5]
    finish(window, 4, 5)
    assert step(window) == [4, 5]
    assert window.over


def test_drops_of_an_epoch_make_fewer_steps() -> None:
    window = PromptWindow(2, 1, 6, max_refill=3.0)
    assert (window.total_steps, start_all(window)) == (3, [0, 1, 2, 3])
    drop(window, 0, 2)
    assert start_all(window) == [4, 5]
    finish(window, 1, 3)
    assert step(window) == [1, 3]
    finish(window, 4)
    drop(window, 5)
    chosen = window.reserve()
    window.commit()
    assert ([g.prompt.ordinal for g in chosen.groups], chosen.drops) == ([4], {5: NO_SIGNAL})
    assert window.over and window.steps_taken == 2


def test_a_reserved_step_belongs_to_the_checkpoint_until_it_is_sent() -> None:
    window = PromptWindow(2, 1, 20)
    start_all(window)
    finish(window, 0, 1, 2)
    window.reserve()
    kept, again = window.answers(), window.again()
    assert ([answer.ordinal for answer in kept], again) == ([0, 1, 2], [3])
    restored = PromptWindow(2, 1, 20)
    restored.restore(0, kept, window.next_ordinal, again)
    assert restored.admit(0) == 3
    assert step(restored) == [0, 1]


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts_per_step"):
        PromptWindow(0, 1, 5)


class Play:
    """Random events on a window; a checkpoint may be restored at any time."""

    def __init__(self, seed: int, order: str, per_step: int, staleness: int, total: int, refill: float):
        self.rng, self.order, self.staleness = random.Random(seed), order, staleness
        self.sizes = (per_step, staleness, total, 0, refill)
        self.window = self.fresh()
        self.steps: list[Chosen] = []
        self.saved: tuple[int, list[Answer], int, list[int]] = (0, [], 0, [])
        self.versions = [0, 0, 0]

    def fresh(self) -> PromptWindow:
        if self.order == "oversampled":
            return OversampledWindow(*self.sizes, extra=self.sizes[0])
        return ORDERS[self.order](*self.sizes)

    def event(self) -> None:
        rng, window = self.rng, self.window
        kind = rng.choice(["hand", "hand", "finish", "finish", "lose", "drop", "ack", "train", "save", "die"])
        replica = rng.randrange(3)
        if kind == "hand" and (ordinal := window.admit(self.versions[replica])) is not None:
            window.hand_out(ordinal, Flight(replica, 1, self.versions[replica]))
        elif kind in ("finish", "drop") and window.in_flight:
            ordinal = rng.choice(sorted(window.in_flight))
            if kind == "finish":
                finish(window, ordinal)
            elif rng.random() < 0.2:
                drop(window, ordinal)
        elif kind == "lose" and rng.random() < 0.2:
            window.give_back(replica)
        elif kind == "ack":
            self.versions[replica] = len(self.steps)
        elif kind == "train":
            self.train()
        elif kind == "save":
            answers = [Answer(a.ordinal, a.deadline, a.group, a.reason, a.place) for a in window.answers()]
            self.saved = (len(self.steps), answers, window.next_ordinal, window.again())
        elif kind == "die" and rng.random() < 0.1:
            self.window = self.fresh()
            self.window.restore(*self.saved)
            self.steps = self.steps[: self.saved[0]]
            self.versions = [self.saved[0]] * 3

    def train(self) -> None:
        """The policy may still be busy with the step before: then the next is reserved, and sent later."""
        if self.window.ahead is None and self.window.ready():
            self.window.reserve()
        if self.window.ahead is not None and self.rng.random() < 0.5:
            chosen = self.window.ahead
            self.window.commit()
            for group in chosen.groups:
                born = group.trajectories[0].oldest_version
                assert 0 <= chosen.step - 1 - born <= self.staleness
            self.steps.append(chosen)
            assert chosen.step == len(self.steps)

    @property
    def finished(self) -> bool:
        return self.window.over and self.window.ahead is None


def test_the_slowest_are_cancelled_once_and_then_waited_for() -> None:
    window = OversampledWindow(2, 0, None, total_steps=3, extra=1)
    assert start_all(window) == [0, 1, 2], "one more than the step needs"
    finish(window, 1, 2)
    owner = window.in_flight[0].owner
    chosen = window.reserve()
    window.commit()
    assert [g.prompt.ordinal for g in chosen.groups] == [1, 2]
    assert (cancelled_flights(chosen), chosen.again, chosen.drops) == ({0: ["1"]}, 1, {})
    assert not window.finish(0, owner, make_group(0)), "too late"
    assert start_all(window, version=1) == [0, 3, 4]
    finish(window, 3, 4)
    assert not window.ready(), "0 was cancelled once"
    finish(window, 0)
    assert step(window) == [0, 3]
    assert (window.kept, window.again()) == ({4}, [4]), "finished, but too late for its only step"
    assert start_all(window, version=2) == [4, 5], "no more than the last step needs"
    finish(window, 4)
    assert not window.ready()
    finish(window, 5)
    assert step(window) == [4, 5] and window.over


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    order=st.sampled_from([*sorted(ORDERS), "oversampled"]),
    per_step=st.integers(1, 5),
    staleness=st.integers(0, 3),
    total=st.integers(1, 40),
    refill=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_every_prompt_once_and_never_too_stale_under_random_events(
    seed: int, order: str, per_step: int, staleness: int, total: int, refill: float
) -> None:
    """Hand out, finish in any order, lose replicas, drop prompts, save, die and restore."""
    play = Play(seed, order, per_step, staleness, total, refill)
    for _ in range(20_000):
        if play.finished:
            break
        play.event()
    assert play.finished
    trained = [group.prompt.ordinal for chosen in play.steps for group in chosen.groups]
    dropped = [ordinal for chosen in play.steps for ordinal in chosen.drops]
    assert sorted(trained + dropped) == list(range(total))
    assert all(len(chosen.groups) <= per_step for chosen in play.steps)
    if refill == 0 and not dropped:
        assert [len(chosen.groups) for chosen in play.steps[:-1]] == [per_step] * (len(play.steps) - 1)
    if order == "strict" or (order == "deadline" and staleness == 0):
        assert trained == sorted(trained)
