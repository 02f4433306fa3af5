"""The environment `tools`: calls in a turn are answered by their results; a turn without any is the last."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Literal

from hpc_rl.simulators.base import Result, SimulatorSettings, Slots, Task, Turn
from hpc_rl.simulators.config import ToolsConfig
from hpc_rl.simulators.tools.parsers import PARSERS, Call, Malformed
from hpc_rl.simulators.tools.pool import Answer, ToolPool
from hpc_rl.simulators.tools.wire import Setup


class Tools:
    """See `TextSimulator`. Tools keep nothing between calls, so a slot has no state but that it plays."""

    kind: Literal["text", "arrays"] = "text"

    def __init__(self, settings: SimulatorSettings) -> None:
        config: ToolsConfig = settings.config
        self.config = config
        self.slots = settings.slots
        self.tools: list[dict[str, Any]] = []
        setup = Setup(config.tools, list(settings.plugins), settings.code, config.memory_gb)
        self._pool = ToolPool(setup, settings.workers)
        self._playing = Slots(settings.slots)
        self._parse = PARSERS[config.parser]

    async def start(self) -> None:
        await self._pool.start()
        self.tools = self._pool.schemas

    async def reset(self, slots: Sequence[int], tasks: Sequence[Task], seeds: Sequence[int]) -> list[Any]:
        self._playing.begin(slots)
        return [[] for _ in slots]

    async def step(self, slots: Sequence[int], actions: Sequence[Turn]) -> list[Result]:
        self._playing.require(slots)
        results = await asyncio.gather(*(self._step(action) for action in actions))
        for slot, result in zip(slots, results, strict=True):
            if result.done:
                self._playing.end(slot)
        return list(results)

    async def _step(self, turn: Turn) -> Result:
        calls = [] if turn.finish == "length" else self._parse(turn.text)
        if not calls:
            return Result([], done=True)
        began = time.monotonic()
        answers = await asyncio.gather(*(self._answer(number, call) for number, call in enumerate(calls)))
        failed = sum(answer.failed for answer in answers)
        messages = [
            {
                "role": "tool",
                "name": call.name if isinstance(call, Call) else "unknown",
                "content": self._shown(answer),
            }
            for call, answer in zip(calls, answers, strict=True)
        ]
        info = {
            "tool_calls": float(len(calls)),
            "tool_errors": float(failed),
            "tool_s": time.monotonic() - began,
        }
        return Result(messages, self.config.error_reward if failed else self.config.call_reward, info=info)

    async def _answer(self, number: int, call: Call | Malformed) -> Answer:
        if isinstance(call, Malformed):
            return Answer(call.why, True)
        if number >= self.config.max_calls:
            return Answer(f"only {self.config.max_calls} calls are made in one turn", True)
        return await self._pool.call(call.name, call.arguments)

    def _shown(self, answer: Answer) -> str:
        text = f"Error: {answer.text}" if answer.failed else answer.text
        limit = self.config.max_chars
        return text if len(text) <= limit else f"{text[:limit]}\n[{len(text) - limit} characters left out]"

    async def close(self) -> None:
        await self._pool.close()
