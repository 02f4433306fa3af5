"""Advantages that need rewards alone (NumPy, no torch): the controller computes them.

`group_std`   GRPO (Shao et al. 2024, arXiv:2402.03300): A_i = (R_i - mean(R)) / (std(R) + eps) in the group.
`group_mean`  Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): A_i = R_i - mean(R); does not favour low variance.
`rloo`        Ahmadian et al. 2024, arXiv:2402.14740: A_i = R_i - mean of the others' R.
`maxrl`       arXiv:2602.02710: A_i = (R_i - mean(R)) / mean(R), for rewards that are not negative.
`batch_std`   REINFORCE++ (arXiv:2501.03262): (R - mean) / std over all answers of the step.
`group_mean_batch_std`  its -baseline variant: R - mean of the group, over the std of that in the whole step.

An algorithm's config names its estimator (`advantage`); the controller looks it up in `ESTIMATORS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def group_advantages(rewards: npt.ArrayLike, *, normalize_std: bool = True, eps: float = 1e-6) -> FloatArray:
    """Group-normalised advantages of rewards `[G]` or `[groups, G]`; the last axis is the prompt group.

    The standard deviation is the unbiased one (n - 1). A NaN reward (could not be scored) counts
    neither in the mean nor in the deviation and gets advantage 0. A group without variance (equal
    rewards up to rounding, or fewer than two scored) gets zeros: dividing rounding noise by `eps`
    would make it the loudest group of the batch. Infinite rewards raise ValueError.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.ndim == 0:
        raise ValueError("rewards must have a group axis")
    if np.isinf(values).any():
        raise ValueError("a reward is infinite; rewards must be finite, or NaN where scoring failed")
    scored = ~np.isnan(values)
    count = scored.sum(axis=-1, keepdims=True)
    filled = np.where(scored, values, 0.0)
    mean = filled.sum(axis=-1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(scored, values - mean, 0.0)
    deviation = np.sqrt((centred**2).sum(axis=-1, keepdims=True) / np.maximum(count - 1, 1))
    scale = np.abs(filled).max(axis=-1, keepdims=True, initial=0.0)
    flat = (count < 2) | (deviation <= 1e-6 * scale)
    divisor = deviation + eps if normalize_std else np.ones_like(deviation)
    return np.where(flat, 0.0, centred / np.where(flat, 1.0, divisor))


def has_signal(rewards: npt.ArrayLike) -> bool:
    """Whether the answers of one prompt group `[G]` differ in reward (else they teach nothing)."""
    return bool(np.any(group_advantages(rewards, normalize_std=False)))


def _each(of_group: Callable[[FloatArray], FloatArray]) -> Callable[[Sequence[FloatArray]], list[FloatArray]]:
    """An estimator that looks at one group at a time."""
    return lambda groups: [of_group(group) for group in groups]


def _rloo(rewards: FloatArray) -> FloatArray:
    """R_i - mean of the others is n / (n - 1) times R_i - mean of all."""
    count = int((~np.isnan(rewards)).sum())
    return group_advantages(rewards, normalize_std=False) * (count / max(count - 1, 1))


def _maxrl(rewards: FloatArray) -> FloatArray:
    if (rewards < 0).any():  # a NaN is not
        raise ValueError(
            f"algorithm maxrl divides by the mean reward, and one is {np.nanmin(rewards):g}: its rewards "
            "must not be negative (reward.*.weight, or another algorithm)"
        )
    centred = group_advantages(rewards, normalize_std=False)
    return centred / np.nanmean(rewards) if centred.any() else centred


def _batch_std(groups: Sequence[FloatArray]) -> list[FloatArray]:
    return _split(group_advantages(np.concatenate(groups)), groups)


def _group_mean_batch_std(groups: Sequence[FloatArray]) -> list[FloatArray]:
    """Centred rewards have mean 0 in every group and so in the batch: only their deviation is divided out."""
    centred = np.concatenate([group_advantages(group, normalize_std=False) for group in groups])
    count = int((~np.isnan(np.concatenate(groups))).sum())
    deviation = float(np.sqrt((centred**2).sum() / max(count - 1, 1)))
    return _split(centred / (deviation + 1e-6) if deviation > 0 else centred, groups)


def _split(flat: FloatArray, groups: Sequence[FloatArray]) -> list[FloatArray]:
    return np.split(flat, np.cumsum([len(group) for group in groups])[:-1])


ESTIMATORS: dict[str, Callable[[Sequence[FloatArray]], list[FloatArray]]] = {
    "group_std": _each(group_advantages),
    "group_mean": _each(lambda group: group_advantages(group, normalize_std=False)),
    "rloo": _each(_rloo),
    "maxrl": _each(_maxrl),
    "batch_std": _batch_std,
    "group_mean_batch_std": _group_mean_batch_std,
}


def step_advantages(estimator: str, rewards: Sequence[npt.ArrayLike]) -> list[FloatArray]:
    """The advantages of all answers of a step; `rewards` has one `[G]` per prompt group. NaN, infinite and
    equal rewards as in `group_advantages`. Raises ValueError."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown advantage {estimator!r}; known: {', '.join(ESTIMATORS)}")
    if not rewards:
        return []
    return ESTIMATORS[estimator]([np.asarray(group, dtype=np.float64) for group in rewards])


def turn_advantages(
    estimator: str,
    outcomes: Sequence[npt.ArrayLike],
    turn_rewards: Sequence[Sequence[Sequence[float]]],
) -> list[list[FloatArray]]:
    """The advantages of the turns of all trajectories of a step: `result[group][i]` has one per turn.

    MT-GRPO (Zeng et al. 2025, arXiv:2505.11821), for any number of turns: turn k of trajectory i gets
    A_i,k = A(R)_i + sum over j >= k of A(r_j)_i, where R is what its end earned (`outcomes`, one `[G]` per
    group) and r_j what the j-th turns earned, each compared with those of the group that have it. A turn is
    thus not praised for what came before it. NaN outcomes (not scored) get zeros. Raises ValueError.
    """
    ends = step_advantages(estimator, outcomes)
    scored = [~np.isnan(np.asarray(group, dtype=np.float64)) for group in outcomes]
    longest = max((len(turns) for group in turn_rewards for turns in group), default=0)
    of_turns = []
    for k in range(longest):
        column = [
            [turns[k] if ok and len(turns) > k else math.nan for turns, ok in zip(group, known, strict=True)]
            for group, known in zip(turn_rewards, scored, strict=True)
        ]
        of_turns.append(step_advantages(estimator, column))
    return [
        [
            ends[g][i] + np.cumsum([of_turns[k][g][i] for k in range(len(turns))][::-1])[::-1]
            for i, turns in enumerate(group)
        ]
        for g, group in enumerate(turn_rewards)
    ]


def overlong_penalty(lengths: npt.ArrayLike, max_tokens: int, buffer: int) -> FloatArray:
    """DAPO's soft punishment (arXiv:2503.14476) for answers of so many tokens: 0 up to `max_tokens -
    buffer`, from there linearly to -1 at `max_tokens`. A buffer of 0 punishes nothing."""
    sizes = np.asarray(lengths, dtype=np.float64)
    if buffer == 0:
        return np.zeros_like(sizes)
    return np.clip((max_tokens - buffer - sizes) / buffer, -1.0, 0.0)
