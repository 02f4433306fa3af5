"""The frames of one push between the thread that makes them and the lanes that send them."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass

import torch

from hpc_rl.weights.protocol import ABORT, Frame, WeightTransferError

NO_PAYLOAD = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class _Pair:
    whole: Frame
    change: Frame | None


class Outgoing:
    """Numbered frames; each lane takes them at its own pace. `base` is the version that the changes start
    from, or None where the push is whole."""

    def __init__(self, base: int | None = None) -> None:
        self.base = base
        self._pairs: dict[int, _Pair] = {}
        self._count = 0
        self._last: Frame | None = None
        self._moved = threading.Condition()
        self._sent: dict[int, int] = {}  # lane -> how many frames it has sent

    # --- who makes the frames -------------------------------------------------------------------------
    def publish(self, whole: Frame, change: Frame | None = None) -> None:
        with self._moved:
            self._pairs[self._count] = _Pair(whole, change)
            self._count += 1
            self._moved.notify_all()

    def finish(self, last: Frame) -> None:
        """END or ABORT."""
        with self._moved:
            self._last = last
            self._moved.notify_all()

    def behind(self, lanes: list[int]) -> list[int]:
        """Which of `lanes` have not sent all frames published so far."""
        with self._moved:
            return self._late(lanes)

    def wait_sent(self, lanes: list[int], limit_s: float) -> None:
        """Until `lanes` have sent all frames published so far, or `limit_s` has passed."""
        with self._moved:
            self._moved.wait_for(lambda: not self._late(lanes), limit_s)

    def forget(self) -> None:
        """The frames published so far, with their memory; a lane that still wants one fails."""
        with self._moved:
            self._pairs.clear()

    def _late(self, lanes: list[int]) -> list[int]:
        return [lane for lane in lanes if self._sent.get(lane, 0) < self._count]

    # --- the lanes ------------------------------------------------------------------------------------
    def frame(self, index: int, changes: bool, deadline: float) -> Frame:
        """Frame `index`, or the last one after all others. Raises WeightTransferError at the deadline."""
        with self._moved:

            def ready() -> bool:
                return index in self._pairs or index < self._count or self._last is not None

            if not self._moved.wait_for(ready, max(0.0, deadline - time.monotonic())):
                raise WeightTransferError("the policy gathered no further bucket before the deadline")
            if self._last is not None and (self._last.kind == ABORT or index >= self._count):
                return self._last
            if index not in self._pairs:
                raise WeightTransferError("the replica was given up")
            pair = self._pairs[index]
        return pair.change if changes and pair.change is not None else pair.whole

    def sent(self, lane: int, count: int) -> None:
        """`lane` has sent its first `count` frames."""
        with self._moved:
            self._sent[lane] = count
            self._moved.notify_all()

    def gone(self, lane: int) -> None:
        """`lane` takes no more frames: nobody is to wait for it."""
        self.sent(lane, sys.maxsize)
