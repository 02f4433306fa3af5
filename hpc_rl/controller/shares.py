"""The share of time that something was idle, from one step to the next."""

from __future__ import annotations

import time
from collections.abc import Callable


class Share:
    """Mean over time of a number between 0 and 1 that is told before it changes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = self._last = clock()
        self._sum = 0.0

    def add(self, value: float) -> None:
        """It was `value` since the last call."""
        now = self._clock()
        self._sum += value * (now - self._last)
        self._last = now

    def take(self) -> float:
        """The mean since the last `take`; starts anew. `add` comes right before."""
        seconds = self._last - self._since
        mean = self._sum / seconds if seconds > 0 else 0.0
        self._since, self._sum = self._last, 0.0
        return mean
