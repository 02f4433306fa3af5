"""Advantages that need rewards alone (NumPy, no torch): the controller computes them.

GRPO (Shao et al. 2024, arXiv:2402.03300): A_i = (R_i - mean(R)) / (std(R) + eps) within the prompt group.
Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): A_i = R_i - mean(R), which does not favour prompts of
low variance; `normalize_std=False`.
"""

from __future__ import annotations

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
    """Whether one prompt group `[G]` has any advantage other than 0 (else training on it does nothing)."""
    return bool(np.any(group_advantages(rewards, normalize_std=False)))
