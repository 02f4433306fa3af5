"""The scorer pool: a few scorer processes beside a replica, each with one sample at a time.

The deadline of a reward starts when a scorer takes it up, not while it waits for a scorer or behind the
other rewards. A scorer that hangs or dies is killed and replaced; its sample gets no score
(`Scored.error`), and `Scored.failed` names the reward. One that died between two samples costs none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hpc_rl.rewards.base import RewardError, RewardSpec, SampleInfo
from hpc_rl.rewards.lines import LineFailed, LineProcess
from hpc_rl.rewards.wire import Began, Ready, Reply, Request, Setup

START_S = 60.0
TAKE_UP_S = 30.0


@dataclass
class Scored:
    """The scores of one sample by reward key, their weighted sum, why there is no sum, and the keys of
    the rewards that failed."""

    scores: dict[str, float] = field(default_factory=dict)
    total: float = 0.0
    error: str = ""
    failed: tuple[str, ...] = ()


class ScorerFailed(RuntimeError):
    """The scorer died, was killed or is to be killed. `key` is the reward that ran; "" if none had begun."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key


class _Scorer:
    def __init__(self, process: LineProcess) -> None:
        self._process = process
        self.kill = process.kill

    @classmethod
    async def start(cls, setup: Setup) -> _Scorer:
        """Raises RewardError when the rewards cannot be made, or nothing answers in START_S."""
        process = await LineProcess.start("hpc_rl.rewards.scorer", "scorer")
        try:
            async with asyncio.timeout(START_S):
                await process.write(msgspec.json.encode(setup))
                ready = msgspec.json.decode(await process.read(), type=Ready)
        except (TimeoutError, LineFailed) as error:
            await process.kill()
            raise RewardError(f"a scorer process did not start within {START_S:.0f} s: {error}") from error
        except asyncio.CancelledError:
            await process.kill()
            raise
        if ready.error:
            await process.kill()
            raise RewardError(f"the rewards cannot be made: {ready.error}")
        return cls(process)

    async def ask(self, request: Request, limits: dict[str, float]) -> Reply:
        """`limits`: seconds per reward. Raises ScorerFailed; the scorer is then of no further use."""
        key = ""
        try:
            async with asyncio.timeout(TAKE_UP_S):
                await self._process.write(msgspec.json.encode(request))
                line = await self._process.read()
            while not isinstance(message := msgspec.json.decode(line, type=Began | Reply), Reply):
                key = message.key
                async with asyncio.timeout(limits[key]):
                    line = await self._process.read()
        except TimeoutError as error:
            if not key:
                raise ScorerFailed(f"a scorer took no sample within {TAKE_UP_S:.0f} s") from error
            raise ScorerFailed(f"reward {key!r} took more than {limits[key]:g} s", key) from error
        except LineFailed as error:
            raise ScorerFailed(f"reward {key!r}: {error}" if key else str(error), key) from error
        except msgspec.DecodeError as error:
            raise ScorerFailed(f"a scorer wrote no message: {error}", key) from error
        return message


class ScorerPool:
    """`size` scorer processes. Use from one event loop. `limit_s` overrides the rewards' own limits."""

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        plugins: Sequence[str] = (),
        code: str = "",
        size: int = 2,
        limit_s: float | None = None,
    ) -> None:
        self._setup = Setup(list(specs), list(plugins), code)
        self._weights = {spec.key: spec.weight for spec in specs}
        self._limits = {spec.key: spec.limit_s if limit_s is None else limit_s for spec in specs}
        self._size = size
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
        self,
        prompt: str,
        response: str,
        answer: str | None,
        fields: dict[str, Any] | None = None,
        sample: SampleInfo | None = None,
    ) -> Scored:
        """Score one sample; a failure is in `Scored.error` and in the counters, not raised."""
        scorer = await self._free.get()
        self._number += 1
        request = Request(self._number, prompt, response, answer, fields or {}, sample)
        try:
            reply = None
            while reply is None:
                used = scorer is not None
                scorer = scorer or await self._new()
                try:
                    reply = await scorer.ask(request, self._limits)
                except ScorerFailed as error:
                    await self._discard(scorer)
                    scorer = None
                    if error.key or not used:
                        return self._failed({error.key: str(error)}, {})
                    # It died after its last sample, so not of this one: a new process takes it.
            if reply.retire:
                await self._discard(scorer, killed=False)
                scorer = None
        except RewardError as error:  # a replacement did not start
            return self._failed({"": str(error)}, {})
        except asyncio.CancelledError:
            await self._discard(scorer)
            scorer = None  # its reply would be read by the next request
            raise
        finally:
            self._free.put_nowait(scorer)
        if reply.number != request.number:
            raise RewardError(f"scorer answered sample {reply.number} instead of {request.number}")
        if reply.errors:
            return self._failed(reply.errors, reply.scores)
        total = sum(self._weights[key] * value for key, value in reply.scores.items())
        return Scored(reply.scores, total)

    def _failed(self, errors: dict[str, str], scores: dict[str, float]) -> Scored:
        self.failures += 1
        keys = tuple(key for key in errors if key)
        return Scored(scores, error="; ".join(errors.values()), failed=keys)

    async def _discard(self, scorer: _Scorer | None, *, killed: bool = True) -> None:
        if scorer is not None:
            self.kills += killed
            self._all.discard(scorer)
            await scorer.kill()

    async def close(self) -> None:
        """Kill all scorers."""
        for scorer in list(self._all):
            self._all.discard(scorer)
            await scorer.kill()
