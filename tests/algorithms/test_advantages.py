"""Group advantages against the written formula, and their behaviour at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.algorithms.advantages import group_advantages, has_signal

REWARDS = st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=2, max_size=16)


@settings(max_examples=100, deadline=None)
@given(REWARDS, st.floats(-100, 100), st.floats(0.5, 20))
def test_shift_and_scale_do_not_matter(rewards: list[float], shift: float, scale: float) -> None:
    base = group_advantages(rewards, eps=0.0)
    moved = group_advantages(np.asarray(rewards) * scale + shift, eps=0.0)
    assert abs(base.sum()) < 1e-6
    np.testing.assert_allclose(moved, base, atol=1e-4)


def test_the_formula_with_the_unbiased_deviation() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    expected = (np.array(rewards) - 0.6) / (np.std(rewards, ddof=1) + 1e-6)
    np.testing.assert_allclose(group_advantages(rewards), expected, rtol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards, normalize_std=False), np.array(rewards) - 0.6)


def test_groups_without_variance_get_zeros() -> None:
    tenth = [0.1 + 0.2, 0.3, 0.3]  # differ by rounding only
    np.testing.assert_array_equal(group_advantages([tenth, [2.0] * 3, [0.0] * 3]), np.zeros((3, 3)))
    assert not has_signal(tenth)
    assert not has_signal([1.0])
    assert has_signal([0.0, 1.0])


def test_unscored_samples_do_not_touch_the_others() -> None:
    with_nan = group_advantages([1.0, float("nan"), 0.0, 0.0])
    assert with_nan[1] == 0.0
    np.testing.assert_allclose(np.delete(with_nan, 1), group_advantages([1.0, 0.0, 0.0]))
    np.testing.assert_array_equal(group_advantages([float("nan"), 1.0]), [0.0, 0.0])
    with pytest.raises(ValueError, match="infinite"):
        group_advantages([1.0, float("inf")])
