"""How many prompt groups a replica gets at a time: as many as its engine takes without queueing.

Additive increase, multiplicative decrease, as TCP finds the width of a line: each answer says how full the
engine is (`EngineLoad`). While the limit binds and nothing waits it grows, by one group per answer until the
first sign of pressure and by one per `limit` answers from then on; under pressure it shrinks to
`SHRINK` of itself, once per `limit` answers, because what is in flight goes on pressing.

Pressure is a queue longer than one group (one waits so that the engine never does), a key-value cache
almost full, or answers that lost their place in it. A group that waits in the engine is worse than one that
waits here: it uses up staleness and is bound to its replica.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_rl.types import EngineLoad

START = 16.0
HIGHEST = 4096.0
SHRINK = 0.75
KV_TARGET, KV_HIGH = 0.85, 0.95
QUEUE_SHARE = 8  # a queue of an eighth of what runs is no pressure


@dataclass
class InFlightLimit:
    """The limit of one replica. `fixed` is the recipe's number (None: found as above)."""

    fixed: int | None = None
    value: float = START
    load: EngineLoad = field(default_factory=EngineLoad)
    _answers: int = 0  # since it shrank
    _pressed: bool = False  # ever

    @property
    def groups(self) -> int:
        return self.fixed if self.fixed is not None else int(self.value)

    def answered(self, load: EngineLoad, group_size: int, in_flight: int) -> None:
        """An answer came back, one of `in_flight` groups of the replica."""
        before, self.load = self.load, load
        if self.fixed is not None:
            return
        self._answers += 1
        queued = load.waiting > max(group_size, load.running // QUEUE_SHARE)
        if queued or load.kv_used > KV_HIGH or load.preempted > before.preempted:
            if self._answers >= self.value or not self._pressed:
                self.value, self._answers = max(1.0, self.value * SHRINK), 0
            self._pressed = True
        elif in_flight >= self.groups and load.kv_used < KV_TARGET:
            self.value = min(HIGHEST, self.value + (1 / self.value if self._pressed else 1.0))
