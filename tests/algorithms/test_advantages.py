"""Group advantages against the written formula, and their behaviour at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.algorithms.advantages import (
    ESTIMATORS,
    group_advantages,
    has_signal,
    overlong_penalty,
    step_advantages,
    turn_advantages,
)

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


NAN = float("nan")


def written(estimator: str, groups: list[list[float]]) -> list[list[float]]:
    """The papers' formulas, one answer at a time; none is given for a NaN reward."""
    scored = [[r for r in group if r == r] for group in groups]
    everything = [r for group in scored for r in group]
    centred = [r - np.mean(group) for group in scored for r in group]
    result = []
    for group, usable in zip(groups, scored, strict=True):
        row = []
        for i, reward in enumerate(group):
            others = [r for j, r in enumerate(group) if j != i and r == r]
            match estimator:
                case "group_std":
                    row.append((reward - np.mean(usable)) / np.std(usable, ddof=1))
                case "group_mean":
                    row.append(reward - np.mean(usable))
                case "rloo":
                    row.append(reward - np.mean(others))
                case "maxrl":
                    row.append((reward - np.mean(usable)) / np.mean(usable))
                case "batch_std":
                    row.append((reward - np.mean(everything)) / np.std(everything, ddof=1))
                case "group_mean_batch_std":
                    row.append((reward - np.mean(usable)) / np.std(centred, ddof=1))
        result.append([0.0 if a != a else float(a) for a in row])
    return result


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_its_written_formula(estimator: str) -> None:
    groups = [[1.0, 0.0, 0.0, 0.5], [0.25, 1.0], [2.0, NAN, 1.0, 0.0]]
    found = step_advantages(estimator, groups)
    for ours, theirs in zip(found, written(estimator, groups), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-12)  # eps 1e-6 in the divisors


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_everywhere_teach_nothing(estimator: str) -> None:
    for found in step_advantages(estimator, [[0.3, 0.1 + 0.2, 0.3], [0.3, NAN], [NAN, NAN]]):
        assert not found.any()
    assert step_advantages(estimator, []) == []


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - {"batch_std"}))
def test_a_group_of_equal_rewards_has_none_beside_others(estimator: str) -> None:
    flat, mixed = step_advantages(estimator, [[1.0, 1.0], [1.0, 0.0]])
    assert not flat.any()
    assert mixed[0] > 0 > mixed[1]


def test_whitening_over_the_batch_needs_no_groups() -> None:
    found = step_advantages("batch_std", [[1.0], [0.0], [0.0], [1.0]])
    np.testing.assert_allclose(np.concatenate(found), np.array([1, -1, -1, 1]) * np.sqrt(3) / 2, rtol=1e-5)


def test_what_an_estimator_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match=r"unknown advantage 'gae'; known: group_std, .*maxrl"):
        step_advantages("gae", [[1.0]])
    with pytest.raises(ValueError, match=r"maxrl divides by the mean reward, and one is -0\.5"):
        step_advantages("maxrl", [[1.0, -0.5]])


@pytest.mark.parametrize(
    "estimator", ["group_std", "group_mean", "rloo", "batch_std", "group_mean_batch_std"]
)
def test_turns_get_what_the_end_and_the_turns_from_them_on_earned(estimator: str) -> None:
    """The written formula, term by term; a turn that others lack, and an answer that was not scored."""
    outcomes = [np.array([1.0, 0.0, np.nan, 0.5]), np.array([0.0, 1.0])]
    turns = [[[0.2, 0.0], [0.0], [5.0, 5.0], [0.1, 0.3, -0.4]], [[0.0, 0.2], [0.1, 0.2]]]
    found = turn_advantages(estimator, outcomes, turns)
    ends = step_advantages(estimator, outcomes)
    for g, group in enumerate(turns):
        for i, earned in enumerate(group):
            assert len(found[g][i]) == len(earned)
            for k in range(len(earned)):
                expected = ends[g][i]
                for j in range(k, len(earned)):
                    column = [
                        np.array([
                            r[j] if len(r) > j and not np.isnan(end) else np.nan
                            for r, end in zip(other, outcomes[h], strict=True)
                        ])
                        for h, other in enumerate(turns)
                    ]  # fmt: skip
                    expected += step_advantages(estimator, column)[g][i]
                assert found[g][i][k] == pytest.approx(expected, abs=1e-12)
    assert found[0][2].tolist() == [0.0, 0.0]
    # Only the last of group 0 has a third turn: in its group there is nothing to compare it with.
    if estimator in ("group_std", "group_mean", "rloo"):
        assert found[0][3][2] == ends[0][3]


def test_two_turns_are_mt_grpo() -> None:
    """A_1 = A(turn) + A(outcome), A_2 = A(outcome), and without turn rewards every turn has the outcome's."""
    outcomes, tools = np.array([1.0, 0.0, 0.0, 1.0]), np.array([0.2, 0.2, 0.0, 0.0])
    ((*rows,),) = turn_advantages("group_std", [outcomes], [[[r, 0.0] for r in tools]])
    end, turn = group_advantages(outcomes), group_advantages(tools)
    assert np.allclose([row[0] for row in rows], turn + end, atol=1e-12)
    assert np.allclose([row[1] for row in rows], end, atol=1e-12)
    ((*plain,),) = turn_advantages("group_std", [outcomes], [[[0.0, 0.0, 0.0]] * 4])
    assert np.allclose(plain, np.repeat(end[:, None], 3, axis=1), atol=1e-12)
    assert turn_advantages("group_std", [], []) == []


def test_the_penalty_of_long_answers() -> None:
    """DAPO's numbers: a limit of 20,480 of which the last 4,096 are punished."""
    found = overlong_penalty([100, 16_384, 18_432, 20_480, 30_000], 20_480, 4096)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])
    assert not overlong_penalty([5, 20], 20, 0).any()
