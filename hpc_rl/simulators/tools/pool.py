"""The hosts of tools beside a replica: a few processes, each with one call at a time.

The deadline of a call starts when a host takes it up, not while it waits for one. A host that hangs or dies
is killed and replaced; the call is answered by an error for the policy to read, and counted.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec

from hpc_rl.recipe.extensions import registry
from hpc_rl.rewards.lines import LineFailed, LineProcess
from hpc_rl.simulators.base import SimulatorError
from hpc_rl.simulators.config import ToolConfig, tool_name
from hpc_rl.simulators.tools.wire import Ready, Reply, Request, Setup

START_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What the policy is told of a call."""

    text: str
    failed: bool


class ToolPool:
    """`size` host processes. Use from one event loop."""

    def __init__(self, setup: Setup, size: int) -> None:
        self._setup = setup
        self._limits = {tool_name(section): _deadline(section) for section in setup.tools}
        self._size = size
        self._free: asyncio.Queue[LineProcess | None] = asyncio.Queue()
        self._all: set[LineProcess] = set()
        self._number = 0
        self.schemas: list[dict[str, Any]] = []
        self.kills = 0

    async def start(self) -> None:
        """Start one host now, so that tools that cannot be made are known. Raises SimulatorError."""
        self._free.put_nowait(await self._new())
        for _ in range(self._size - 1):
            self._free.put_nowait(None)

    async def _new(self) -> LineProcess:
        process = await LineProcess.start("hpc_rl.simulators.tools.host", "tool")
        try:
            async with asyncio.timeout(START_S):
                await process.write(msgspec.json.encode(self._setup))
                ready = msgspec.json.decode(await process.read(), type=Ready)
        except (TimeoutError, LineFailed) as error:
            await process.kill()
            raise SimulatorError(f"a host of tools did not start within {START_S:.0f} s: {error}") from error
        except asyncio.CancelledError:
            await process.kill()
            raise
        if ready.error:
            await process.kill()
            raise SimulatorError(f"the tools cannot be made: {ready.error}")
        self.schemas = ready.schemas
        self._all.add(process)
        return process

    async def call(self, tool: str, arguments: dict[str, Any]) -> Answer:
        """Never raises for what the call does. Raises SimulatorError where no host can be started."""
        if tool not in self._limits:
            return Answer(f"there is no tool {tool!r}; there are: {', '.join(self._limits)}", True)
        process = await self._free.get()
        try:
            process = process or await self._new()
            answer, lost = await self._ask(process, tool, arguments)
            if lost:
                await self._discard(process)
                process = None
            return answer
        except asyncio.CancelledError:
            await self._discard(process)
            process = None  # its reply would be read by the next call
            raise
        finally:
            self._free.put_nowait(process)

    async def _ask(self, process: LineProcess, tool: str, arguments: dict[str, Any]) -> tuple[Answer, bool]:
        """The answer, and whether the process is of no further use."""
        self._number += 1
        number, limit_s = self._number, self._limits[tool]
        try:
            async with asyncio.timeout(limit_s):
                await process.write(msgspec.json.encode(Request(number, tool, arguments)))
                reply = msgspec.json.decode(await process.read(), type=Reply)
        except TimeoutError:
            self.kills += 1
            return Answer(f"{tool} took more than {limit_s:g} s", True), True
        except LineFailed as error:
            self.kills += 1
            return Answer(f"{tool} crashed: {error}", True), True
        except msgspec.DecodeError as error:
            raise SimulatorError(f"a host of tools wrote no message: {error}") from error
        if reply.number != number:
            raise SimulatorError(f"a host answered call {reply.number} instead of {number}")
        return Answer(reply.text, reply.failed), reply.retire

    async def _discard(self, process: LineProcess | None) -> None:
        if process is not None:
            self._all.discard(process)
            await process.kill()

    async def close(self) -> None:
        """Kill all hosts."""
        for process in list(self._all):
            await self._discard(process)


def _deadline(section: dict[str, Any]) -> float:
    """Seconds for one call; a tool whose config has none gets the usual."""
    config = registry("tools").config(section["name"], section)
    if isinstance(config, ToolConfig):
        return config.limit_s + config.beyond_s
    return float(ToolConfig.model_fields["limit_s"].default)
