"""A foreign environment with motor commands, as a plugin would bring it: a point is pushed to a goal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from hpc_rl.recipe.schema import Positive, Section
from hpc_rl.simulators.base import Result, SimulatorSettings, Slots, Task


class PointConfig(Section):
    max_steps: Positive = 8


class Point:
    """Actions are chunks `[chunk, 2]` of pushes; all slots of a call are stepped together."""

    kind: Literal["text", "arrays"] = "arrays"

    def __init__(self, settings: SimulatorSettings) -> None:
        self.slots, self.max_steps = settings.slots, settings.config.max_steps
        self._playing = Slots(settings.slots)
        self._place, self._goal = np.zeros((self.slots, 2)), np.zeros((self.slots, 2))
        self._steps = np.zeros(self.slots, dtype=np.int64)

    async def start(self) -> None:
        pass

    async def reset(self, slots: Sequence[int], tasks: Sequence[Task], seeds: Sequence[int]) -> list[Any]:
        self._playing.begin(slots)
        for slot, task, seed in zip(slots, tasks, seeds, strict=True):
            generator = np.random.default_rng([task.row, seed])
            self._place[slot], self._goal[slot] = generator.uniform(-1, 1, (2, 2))
            self._steps[slot] = 0
        return [self._seen(slot) for slot in slots]

    async def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[Result]:
        self._playing.require(slots)
        rows = list(slots)
        self._place[rows] += np.stack(actions).sum(axis=1)
        self._steps[rows] += 1
        distance = np.linalg.norm(self._place[rows] - self._goal[rows], axis=1)
        done = (distance < 0.1) | (self._steps[rows] >= self.max_steps)
        for slot, over in zip(slots, done, strict=True):
            if over:
                self._playing.end(slot)
        return [
            Result(self._seen(slot), -float(far), bool(over), {"distance": float(far)})
            for slot, far, over in zip(slots, distance, done, strict=True)
        ]

    def _seen(self, slot: int) -> dict[str, np.ndarray]:
        return {"place": self._place[slot].copy(), "goal": self._goal[slot].copy()}

    async def close(self) -> None:
        pass
