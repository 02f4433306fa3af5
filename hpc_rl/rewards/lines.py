"""A helper process beside a replica that speaks in lines: one message per line, on stdin and stdout.

Scorers (`pool.py`) and the hosts of tools (`simulators/tools/pool.py`) are such processes. Each can be killed
with all that it started, so whatever hangs or crashes in it costs one answer and not the replica.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress

LINE_LIMIT = 64 << 20


class LineFailed(RuntimeError):
    """The process has ended, or what it wrote is no line."""


class LineProcess:
    """`python -m module`, in a session of its own. Use from one event loop."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process, self._name = process, name
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin, process.stdout

    @classmethod
    async def start(cls, module: str, name: str) -> LineProcess:
        """`name` is what messages call it."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT,
            start_new_session=True,  # so that what it starts dies with it
        )
        return cls(process, name)

    async def write(self, data: bytes) -> None:
        """One line, without its end. Raises LineFailed."""
        try:
            self._in.write(data + b"\n")
            await self._in.drain()
        except ConnectionError as error:
            raise LineFailed(str(error)) from error

    async def read(self) -> bytes:
        """The next line. Raises LineFailed."""
        try:
            line = await self._out.readline()
        except (ConnectionError, ValueError) as error:  # ValueError: a line beyond the limit
            raise LineFailed(str(error)) from error
        if not line.endswith(b"\n"):
            code = await self._process.wait()
            raise LineFailed(f"the {self._name} process ended with code {code}")
        return line

    async def kill(self) -> None:
        """End it and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
