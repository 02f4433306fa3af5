"""A plugin's environment: it asks once more, and rewards second turns that say something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from hpc_rl.recipe.extensions import register
from hpc_rl.simulators.base import Result, SimulatorSettings, Slots, Task, Turn
from hpc_rl.simulators.config import TextConfig


class AskingConfig(TextConfig):
    """No options beside those of every text environment."""


class Asking:
    """Two turns, whatever is said."""

    kind: Literal["text", "arrays"] = "text"

    def __init__(self, settings: SimulatorSettings) -> None:
        self.slots = settings.slots
        self.tools: list[dict[str, Any]] = []
        self._playing, self._turns = Slots(settings.slots), [0] * settings.slots

    async def start(self) -> None:
        pass

    async def reset(self, slots: Sequence[int], tasks: Sequence[Task], seeds: Sequence[int]) -> list[Any]:
        self._playing.begin(slots)
        for slot in slots:
            self._turns[slot] = 0
        return [[] for _ in slots]

    async def step(self, slots: Sequence[int], actions: Sequence[Turn]) -> list[Result]:
        self._playing.require(slots)
        results = []
        for slot, turn in zip(slots, actions, strict=True):
            self._turns[slot] += 1
            more = [{"role": "user", "content": "and then"}]
            results.append(Result(more, len(turn.text) / 100, self._turns[slot] == 2, {"asked": 1.0}))
        return results

    async def close(self) -> None:
        pass


register(
    "simulators",
    "asking",
    implementation="asking_plugin:Asking",
    config="asking_plugin:AskingConfig",
)
