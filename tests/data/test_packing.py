"""Packing drops nothing, keeps the budget, and gives every rank the same number of forwards."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.data.packing import PackingError, best_fit, pack, pack_fixed
from hpc_rl.data.token_batches import TokenBatcher

LENGTHS = st.lists(st.integers(1, 120), max_size=80)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 100), st.integers(1, 6), st.sampled_from([0.0, 0.01, 1.0]))
def test_pack_is_complete_bounded_and_even(
    lengths: list[int], budget: int, ranks: int, attention: float
) -> None:
    packed = pack(lengths, budget, ranks, attention=attention)
    assert len(packed) == ranks
    assert len({len(batches) for batches in packed}) == 1
    assert packed[0]
    batches = [batch for rank in packed for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= 1 or sum(lengths[i] for i in batch) <= budget
    assert packed == pack(lengths, budget, ranks, attention=attention)
    assert len(packed[0]) == len(pack(lengths, budget, ranks)[0]), "work is levelled without more forwards"


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(1, 6))
def test_pack_fixed_is_complete_bounded_and_even(lengths: list[int], size: int, ranks: int) -> None:
    packed = pack_fixed(lengths, size, ranks)
    assert len({len(batches) for batches in packed}) == 1
    batches = [batch for rank in packed for batch in rank]
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) <= size for batch in batches)


def test_ranks_are_level_and_forwards_few() -> None:
    rng = random.Random(0)
    lengths = [min(2048, int(rng.lognormvariate(5.5, 0.8)) + 1) for _ in range(512)]
    packed = pack(lengths, 4096, 8)
    totals = [sum(lengths[i] for batch in rank for i in batch) for rank in packed]
    assert max(totals) <= 1.02 * min(totals)
    needed = -(-sum(lengths) // 4096)
    assert len(packed[0]) * 8 <= needed + 8
    rounds = [[sum(lengths[i] for i in rank[j]) for rank in packed] for j in range(len(packed[0]))]
    assert all(max(sizes) - min(sizes) <= 0.05 * 4096 for sizes in rounds)


def imbalance(lengths: list[int], packed: list[list[list[int]]], attention: float) -> float:
    """What the forwards take, each as long as its slowest rank, over the work shared out evenly."""
    costs = [length + attention * length**2 for length in lengths]
    rounds = range(len(packed[0]))
    slowest = sum(max(sum(costs[i] for i in rank[j]) for rank in packed) for j in rounds)
    return slowest * len(packed) / sum(costs)


def test_long_and_short_sequences_are_level_in_work_too() -> None:
    """A model of 7 billion parameters (pair cost 2.6e-5), 256 answers of up to 16,384 tokens, 8 ranks."""
    for seed in range(5):
        rng = random.Random(seed)
        lengths = [min(16384, int(rng.lognormvariate(7.5, 1.0)) + 1) for _ in range(256)]
        by_work = imbalance(lengths, pack(lengths, 16384, 8, attention=2.6e-5), 2.6e-5)
        by_tokens = imbalance(lengths, pack(lengths, 16384, 8), 2.6e-5)
        assert by_work <= 1.06
        assert by_work - 1 <= 0.5 * (by_tokens - 1)


def test_overlong_sequences_get_their_own_forward_or_an_error() -> None:
    assert [batch for rank in pack([9, 2, 2], 4, 1) for batch in rank] == [[0], [1, 2]]
    with pytest.raises(PackingError, match="sequence 0 has 9 tokens"):
        pack([9, 2, 2], 4, 1, overlong="error")
    with pytest.raises(ValueError, match="length 0"):
        pack([0], 4, 1)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 100))
def test_best_fit_is_the_textbooks(lengths: list[int], capacity: int) -> None:
    """Each sequence, longest first, into the fullest bin that holds it: the plain loop of the definition."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [capacity - sum(lengths[i] for i in one) for one in bins]
        fitting = [room for room in rooms if room >= lengths[index]]
        if fitting:
            bins[rooms.index(min(fitting))].append(index)
        else:
            bins.append([index])
    found = best_fit(lengths, capacity)
    assert sorted(i for one in found for i in one) == list(range(len(lengths)))
    assert len(found) == len(bins)
    assert sorted(sum(lengths[i] for i in one) for one in found) == sorted(
        sum(lengths[i] for i in one) for one in bins
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 120), min_size=1, max_size=300), st.integers(1, 3))
def test_streamed_batches_lose_nothing_and_nobody_is_overtaken_for_ever(
    lengths: list[int], rows: int
) -> None:
    """A sequence leaves at the latest when all that waited before it have: each step takes the oldest."""
    batcher, step, taken, arrived = TokenBatcher(100 * rows, 100), 0, [], {}
    coming = list(enumerate(lengths))
    while True:
        while batcher.hungry and coming:
            number, length = coming.pop(0)
            arrived[number] = (step, len(batcher.waiting))
            batcher.add((number, 0), length)
        found = batcher.take()
        if not found:
            break
        step += 1
        for row in found:
            assert len(row) == 1 or sum(lengths[number] for number, _ in row) <= 100
            for number, _ in row:
                taken.append(number)
                assert step - arrived[number][0] <= arrived[number][1] + 1
    assert sorted(taken) == list(range(len(lengths)))
