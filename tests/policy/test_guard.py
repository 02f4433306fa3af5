"""Spikes are told from losses that are merely high, and the window survives a resume."""

from __future__ import annotations

import pytest

from hpc_rl.policy.guard import SpikeGuard, name_samples
from hpc_rl.recipe.schema import Guard

pytestmark = pytest.mark.torch


def verdicts(guard: SpikeGuard, losses: list[float]) -> list[bool]:
    return [guard.judge(loss) is not None for loss in losses]


def test_it_stops_after_patience_spikes_in_a_row() -> None:
    guard = SpikeGuard(Guard(spike=2.0, window=20, patience=3))
    assert not any(verdicts(guard, [1.0] * 9 + [50.0]))  # too few to judge by
    assert not any(verdicts(guard, [1.0] * 10))
    assert not any(verdicts(guard, [2.0, 5.0, 5.0, 1.0, 5.0, 5.0, 1.9]))
    assert verdicts(guard, [5.0, 5.0, 5.0]) == [False, False, True]
    assert "the loss 5 is more than policy.guard.spike = 2 times the median 1 " in str(guard.judge(5.0))


def test_spikes_do_not_move_the_median() -> None:
    guard = SpikeGuard(Guard(spike=2.0, window=10, patience=100))
    verdicts(guard, [1.0] * 10 + [9.0] * 50)
    assert guard.limit() == 2.0


def test_without_spike_it_says_nothing_and_saves_nothing() -> None:
    guard = SpikeGuard(Guard())
    assert not any(verdicts(guard, [1.0] * 60 + [1e9] * 10))
    assert guard.state() == {}


@pytest.mark.parametrize("done", [5, 12, 31])
def test_a_resumed_guard_stops_at_the_same_step(done: int) -> None:
    options = Guard(spike=1.5, window=12, patience=4)
    losses = [1.0 + 0.1 * (i % 7) for i in range(30)] + [3.0] * 6
    whole = SpikeGuard(options)
    expected = verdicts(whole, losses)
    assert True in expected
    first = SpikeGuard(options)
    before = verdicts(first, losses[:done])
    second = SpikeGuard(options)
    second.restore(first.state())
    assert before + verdicts(second, losses[done:]) == expected


def test_names_of_samples() -> None:
    assert name_samples([(4, 0), (6, 0), (5, 0), (9, 0), (9, 0)]) == "4-6, 9"
    assert name_samples([(0, 3), (0, 2)]) == "0.2, 0.3"
    assert name_samples([(2 * i, 0) for i in range(20)], most=3) == "0, 2, 4 and 17 more"
