"""The scorer pool: a few scorer processes beside a replica, each with one sample at a time.

The deadline of a sample starts when a scorer takes it up, not while it waits. A scorer that hangs or
dies is killed and replaced; its sample gets no score (`Scored.error`) and is counted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hpc_rl.rewards.base import RewardError, RewardSpec
from hpc_rl.rewards.wire import Ready, Reply, Request, Setup

START_S = 60.0
LINE_LIMIT = 64 << 20


@dataclass
class Scored:
    """The scores of one sample by reward key, their weighted sum, and why there are none."""

    scores: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    error: str = ""


class ScorerFailed(RuntimeError):
    """The scorer died or was killed while it had a sample."""


class _Scorer:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin, process.stdout

    @classmethod
    async def start(cls, setup: Setup) -> _Scorer:
        """Raises RewardError when the rewards cannot be made, or nothing answers in START_S."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "hpc_rl.rewards.scorer",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT,
            start_new_session=True,  # so that what a verifier starts dies with it
        )
        scorer = cls(process)
        try:
            async with asyncio.timeout(START_S):
                ready = msgspec.json.decode(await scorer._exchange(msgspec.json.encode(setup)), type=Ready)
        except (TimeoutError, ScorerFailed) as error:
            await scorer.kill()
            raise RewardError(f"a scorer process did not start within {START_S:.0f} s: {error}") from error
        if ready.error:
            await scorer.kill()
            raise RewardError(f"the rewards cannot be made: {ready.error}")
        return scorer

    async def ask(self, request: Request, limit_s: float) -> Reply:
        """Raises TimeoutError or ScorerFailed; the scorer is then of no further use."""
        async with asyncio.timeout(limit_s):
            line = await self._exchange(msgspec.json.encode(request))
        return msgspec.json.decode(line, type=Reply)

    async def _exchange(self, data: bytes) -> bytes:
        try:
            self._in.write(data + b"\n")
            await self._in.drain()
            line = await self._out.readline()
        except (ConnectionError, ValueError) as error:  # ValueError: a line beyond the limit
            raise ScorerFailed(str(error)) from error
        if not line.endswith(b"\n"):
            code = await self._process.wait()
            raise ScorerFailed(f"the scorer process ended with code {code}")
        return line

    async def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


class ScorerPool:
    """`size` scorer processes. Use from one event loop."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        plugins: Sequence[str] = (),
        code: str = "",
        size: int = 2,
        limit_s: float = 30.0,
    ) -> None:
        self._setup = Setup(list(specs), list(plugins), code)
        self._weights = {spec.key: spec.weight for spec in specs}
        self._size = size
        self._limit_s = limit_s
        self._free: asyncio.Queue[_Scorer | None] = asyncio.Queue()
        self._all: set[_Scorer] = set()
        self._number = 0
        self.failures = 0
        self.kills = 0

    async def start(self) -> None:
        """Start one scorer now, so that a reward that cannot be made is known; the others when needed."""
        self._free.put_nowait(await self._new())
        for _ in range(self._size - 1):
            self._free.put_nowait(None)

    async def _new(self) -> _Scorer:
        scorer = await _Scorer.start(self._setup)
        self._all.add(scorer)
        return scorer

    async def score(
        self, prompt: str, response: str, answer: str | None, fields: dict[str, Any] | None = None
    ) -> Scored:
        """Score one sample; a failure is in `Scored.error` and in the counters, not raised."""
        scorer = await self._free.get()
        self._number += 1
        request = Request(self._number, prompt, response, answer, fields or {})
        try:
            if scorer is None:
                scorer = await self._new()
            reply = await scorer.ask(request, self._limit_s)
        except TimeoutError:
            await self._discard(scorer)
            scorer = None
            return self._failed(f"the rewards took more than {self._limit_s:g} s")
        except (ScorerFailed, msgspec.DecodeError) as error:
            await self._discard(scorer)
            scorer = None
            return self._failed(str(error))
        except RewardError as error:  # a replacement did not start
            return self._failed(str(error))
        except asyncio.CancelledError:
            await self._discard(scorer)
            scorer = None  # its reply would be read by the next request
            raise
        finally:
            self._free.put_nowait(scorer)
        if reply.number != request.number:
            raise RewardError(f"scorer answered sample {reply.number} instead of {request.number}")
        if reply.error:
            return self._failed(reply.error)
        total = sum(self._weights[key] * value for key, value in reply.scores.items())
        return Scored(reply.scores, total)

    def _failed(self, error: str) -> Scored:
        self.failures += 1
        return Scored(error=error)

    async def _discard(self, scorer: _Scorer | None) -> None:
        if scorer is not None:
            self.kills += 1
            self._all.discard(scorer)
            await scorer.kill()

    async def close(self) -> None:
        """Kill all scorers."""
        for scorer in list(self._all):
            self._all.discard(scorer)
            await scorer.kill()
