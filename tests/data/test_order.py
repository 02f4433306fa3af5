"""The order of the data is a permutation, fixed for all time, and a cursor is one integer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.data.order import epoch_order, locate, row_of, step_ordinals, steps_of_epochs


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**32), st.integers(0, 50))
def test_every_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(epoch_order(n, seed, epoch)) == list(range(n))


def test_epochs_and_seeds_differ_and_the_order_never_changes() -> None:
    assert list(epoch_order(8, 0, 0)) == [0, 2, 1, 5, 4, 3, 6, 7]  # a recorded value: resume depends on it
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert list(epoch_order(4, 3, 1, shuffle=False)) == [0, 1, 2, 3]
    assert type(epoch_order(8, 0, 0)[2]) is int


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(1, 4), st.booleans())
def test_steps_cover_each_row_exactly_once_per_epoch(n: int, batch: int, epochs: int, shuffle: bool) -> None:
    steps = steps_of_epochs(n, batch, epochs)
    drawn = [row_of(o, n, 5, shuffle) for step in range(1, steps + 1) for o in step_ordinals(step, batch)]
    for epoch in range(epochs):
        assert sorted(row for e, row in drawn if e == epoch) == list(range(n))


def test_bad_cursors_are_refused() -> None:
    assert locate(7, 3) == (2, 1)
    for call in (lambda: locate(-1, 3), lambda: locate(0, 0), lambda: step_ordinals(0, 4)):
        with pytest.raises(ValueError):
            call()
