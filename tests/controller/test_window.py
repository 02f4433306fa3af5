"""The prompt window: every prompt once, staleness bounded, whatever the order of events."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.controller.window import PromptWindow
from hpc_rl.types import Prompt, PromptGroup, Trajectory, VersionSpan


def make_group(ordinal: int, version: int = 0) -> PromptGroup:
    prompt = Prompt(ordinal=ordinal, epoch=0, row=ordinal, content="x")
    trajectory = Trajectory(
        ordinal=ordinal, sample=0, replica=0, prompt_ids=[1], token_ids=[2], log_probs=[-1.0],
        spans=[VersionSpan(version, 0, 1)], finish="stop",
    )  # fmt: skip
    return PromptGroup(prompt, [trajectory])


def test_admits_up_to_the_staleness_bound_and_no_further() -> None:
    window = PromptWindow(prompts_per_step=2, max_staleness=1, total_prompts=10)
    handed = []
    while (ordinal := window.admit(replica_version=0)) is not None:
        window.hand_out(ordinal, 0, 0)
        handed.append(ordinal)
    assert handed == [0, 1, 2, 3]
    assert window.admit(replica_version=1) == 4


def test_the_last_step_is_smaller_and_nothing_follows_it() -> None:
    window = PromptWindow(prompts_per_step=4, max_staleness=9, total_prompts=6)
    assert window.total_steps == 2
    assert list(window.ordinals(2)) == [4, 5]
    for _ in range(6):
        window.hand_out(window.admit(0), 0, 0)  # type: ignore[arg-type]
    assert window.admit(0) is None


def test_an_answer_from_a_lost_replica_is_ignored_after_its_prompt_went_elsewhere() -> None:
    window = PromptWindow(1, 0, 5)
    window.hand_out(0, replica=0, incarnation=0)
    assert window.give_back(0) == [0]
    assert window.admit(0) == 0
    window.hand_out(0, replica=1, incarnation=0)
    assert not window.finish(0, 0, 0, make_group(0))
    assert window.finish(0, 1, 0, make_group(0))
    assert not window.finish(0, 1, 0, make_group(0))
    assert window.ready(1)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts_per_step"):
        PromptWindow(0, 1, 5)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    per_step=st.integers(1, 5),
    staleness=st.integers(0, 3),
    total=st.integers(1, 40),
    replicas=st.integers(1, 3),
)
def test_every_prompt_once_and_never_too_stale_under_random_events(
    seed: int, per_step: int, staleness: int, total: int, replicas: int
) -> None:
    """Hand out, finish in any order, lose replicas, drop prompts, crash and restore."""
    rng = random.Random(seed)
    window = PromptWindow(per_step, staleness, total)
    versions = dict.fromkeys(range(replicas), 0)
    started_with: dict[int, int] = {}
    trained: list[int] = []
    dropped: list[int] = []
    version = 0
    for _ in range(5000):
        if version == window.total_steps:
            break
        event = rng.choice(["hand", "hand", "finish", "finish", "lose", "drop", "ack", "train", "crash"])
        replica = rng.randrange(replicas)
        if event == "hand" and (ordinal := window.admit(versions[replica])) is not None:
            window.hand_out(ordinal, replica, 0)
            started_with[ordinal] = versions[replica]
        elif event in ("finish", "drop") and window.in_flight:
            ordinal, (owner, incarnation) = rng.choice(sorted(window.in_flight.items()))
            if event == "finish":
                assert window.finish(ordinal, owner, incarnation, make_group(ordinal))
            elif rng.random() < 0.1:
                assert window.drop(ordinal, owner, incarnation, "bad row")
        elif event == "lose" and rng.random() < 0.2:
            window.give_back(replica)
        elif event == "ack":
            versions[replica] = version
        elif event == "train" and window.ready(version + 1):
            groups, drops = window.take(version + 1)
            for group in groups:
                assert version - started_with[group.prompt.ordinal] <= staleness
            trained += [group.prompt.ordinal for group in groups]
            dropped += list(drops)
            version += 1
        elif event == "crash" and rng.random() < 0.1:
            done, gone = list(window.done.values()), dict(window.dropped)
            window = PromptWindow(per_step, staleness, total)
            window.restore(version, done, gone)
            versions = dict.fromkeys(range(replicas), version)
    assert version == window.total_steps
    assert trained == sorted(trained)
    assert sorted(trained + dropped) == list(range(total))
