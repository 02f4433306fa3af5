"""Stops a run that goes wrong: losses that leave their usual range and stay outside of it.

A loss or gradient that is not finite is found by `step.py`, before the optimizer moves a weight. Here is
the other way to lose a run: finite losses far above the recent ones, several steps in a row.
"""

from __future__ import annotations

import statistics
from collections import deque

import torch
from torch import Tensor

from hpc_rl.recipe.schema import Guard

MIN_LOSSES = 10  # fewer say nothing about what is usual


class SpikeGuard:
    """Sees every step's loss (the same on all ranks). Its window is saved with the checkpoint, so that a
    resumed run stops at the same step as one that was never interrupted.

    Losses that are judged to be spikes do not enter the window: they would move the median after them.
    """

    def __init__(self, options: Guard) -> None:
        self.options = options
        self.losses: deque[float] = deque(maxlen=options.window)
        self.streak = 0

    def judge(self, loss: float) -> str | None:
        """None, or what is wrong once `patience` spikes came in a row."""
        limit = self.limit()
        if limit is None or loss <= limit:
            self.losses.append(loss)
            self.streak = 0
            return None
        self.streak += 1
        if self.streak < self.options.patience:
            return None
        median = statistics.median(self.losses)
        return (
            f"the loss {loss:.4g} is more than policy.guard.spike = {self.options.spike:g} times the median "
            f"{median:.4g} of the last {len(self.losses)} steps, {self.streak} steps in a row"
        )

    def limit(self) -> float | None:
        """The highest loss that is no spike; None while there are too few to judge by."""
        enough = min(MIN_LOSSES, self.options.window)
        if self.options.spike is None or len(self.losses) < enough:
            return None
        return self.options.spike * statistics.median(self.losses)

    def state(self) -> dict[str, Tensor]:
        """`guard`: the streak, the number of losses, then the losses, oldest first ([2 + window])."""
        if self.options.spike is None:
            return {}
        values = torch.zeros(2 + self.options.window, dtype=torch.float64)
        values[0], values[1] = self.streak, len(self.losses)
        values[2 : 2 + len(self.losses)] = torch.tensor(list(self.losses), dtype=torch.float64)
        return {"guard": values}

    def restore(self, state: dict[str, Tensor]) -> None:
        values = state["guard"].tolist()
        self.streak = int(values[0])
        self.losses.clear()
        self.losses.extend(values[2 : 2 + int(values[1])])


def name_samples(samples: list[tuple[int, int]], most: int = 16) -> str:
    """`(ordinal, number)` of samples as text: runs of ordinals where each has one sample, at most so many.

    >>> name_samples([(4, 0), (5, 0), (6, 0), (9, 0)])
    '4-6, 9'
    """
    ordered = sorted(set(samples))
    if any(number for _, number in ordered):
        parts = [f"{ordinal}.{number}" for ordinal, number in ordered]
    else:
        parts = _runs([ordinal for ordinal, _ in ordered])
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return ", ".join(parts[:most]) + more


def _runs(numbers: list[int]) -> list[str]:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in parts]
