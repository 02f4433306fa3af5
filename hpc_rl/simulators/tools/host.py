"""One host of tools: `python -m hpc_rl.simulators.tools.host`, lines in on stdin, lines out on stdout.

It is separate so that it can be killed: a tool that hangs or crashes costs one call. What tools print goes to
stderr, for stdout is the wire. One call at a time, in the main thread.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec

from hpc_rl.recipe.plugins import import_plugins
from hpc_rl.rewards.scorer import Memory, die_with_parent, go_first
from hpc_rl.simulators.config import tool_name
from hpc_rl.simulators.tools.base import Tool, ToolError, make_tool
from hpc_rl.simulators.tools.wire import Ready, Reply, Request, Setup


class Host:
    """Answers calls. Coroutines of async tools run on one loop that lasts as long as the process."""

    def __init__(self, tools: dict[str, Tool], memory: Memory) -> None:
        self._tools, self._memory = tools, memory
        self._runner: asyncio.Runner | None = None

    def answer(self, request: Request) -> Reply:
        reply = Reply(request.number, "")
        try:
            value: Any = self._tools[request.tool].call(request.arguments)
            if isinstance(value, Awaitable):
                value = self._wait_for(value)
            reply.text = str(value)
        except ToolError as error:
            reply.text, reply.failed = str(error), True
        except (Exception, SystemExit) as error:  # noqa: BLE001 -- user code: anything may come
            reply.text, reply.failed = f"{type(error).__name__}: {error}", True
            reply.retire |= isinstance(error, MemoryError)
        reply.retire |= self._memory.short()
        return reply

    def _wait_for(self, value: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await value

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(wait())


def prepare(setup: Setup) -> dict[str, Tool]:
    """Import the plugins and make the tools, by the names that the policy calls them by."""
    if setup.plugins:
        import_plugins(setup.plugins, Path(setup.code))
        sys.path.insert(0, setup.code)
    return {tool_name(section): make_tool(section) for section in setup.tools}


def main() -> int:
    die_with_parent()
    go_first()
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a tool that calls input() must not eat the next call

    def write(message: Ready | Reply) -> None:
        wire.write(msgspec.json.encode(message) + b"\n")
        wire.flush()

    try:
        setup = msgspec.json.decode(lines.readline(), type=Setup)
        tools = prepare(setup)
        host = Host(tools, Memory(setup.memory_gb))
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- a plugin may raise anything; the pool says it
        write(Ready(error=f"{type(error).__name__}: {error}"))
        return 1
    write(Ready(schemas=[tool.schema for tool in tools.values()]))
    for line in lines:
        write(host.answer(msgspec.json.decode(line, type=Request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
