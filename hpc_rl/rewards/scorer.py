"""One scorer process: `python -m hpc_rl.rewards.scorer`, lines in on stdin, lines out on stdout.

It is separate so that it can be killed: a verifier that hangs or crashes costs one sample, not the
replica. What rewards print goes to stderr, for stdout is the wire. Rewards run in the main thread, one
sample at a time: math-verify and others set alarms, which no other thread can.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import sys
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from hpc_rl.recipe.plugins import import_plugins
from hpc_rl.rewards.base import MEMORY_GB, RewardSpec, Score, checked, make_reward
from hpc_rl.rewards.wire import Began, Ready, Reply, Request, Setup

_PR_SET_PDEATHSIG = 1


def prepare(setup: Setup) -> list[tuple[RewardSpec, Score]]:
    """Import the plugins and make the rewards."""
    if setup.plugins:
        import_plugins(setup.plugins, Path(setup.code))
        sys.path.insert(0, setup.code)
    return [(spec, make_reward(spec)) for spec in setup.rewards]


class Scorer:
    """Answers requests. Coroutines of async rewards run on one loop that lasts as long as the process."""

    def __init__(self, rewards: list[tuple[RewardSpec, Score]], wire: BinaryIO, memory: Memory) -> None:
        self._rewards = rewards
        self._wire = wire
        self._memory = memory
        self._runner: asyncio.Runner | None = None

    def answer(self, request: Request) -> Reply:
        """Score one sample. A reward's exception becomes its error; the others are asked all the same."""
        reply = Reply(request.number, {}, {})
        for spec, score in self._rewards:
            write(self._wire, Began(request.number, spec.key))
            try:
                value: Any = score(
                    request.prompt, request.response, request.answer, request.fields, request.sample
                )
                if isinstance(value, Awaitable):
                    value = self._wait_for(value)
                reply.scores[spec.key] = checked(spec, value)
            except (Exception, SystemExit) as error:  # noqa: BLE001 -- user code: anything may come
                reply.errors[spec.key] = f"reward {spec.key!r}: {type(error).__name__}: {error}"
                reply.retire |= isinstance(error, MemoryError)
        reply.retire |= self._memory.short()
        return reply

    def _wait_for(self, value: Awaitable[float]) -> float:
        async def wait() -> float:
            return await value

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(wait())


class Memory:
    """A bound on the process's own memory, so that a reward that eats it gets a MemoryError and not the
    node. `short` tells when less than half of what was free at the start is left."""

    def __init__(self, limit_gb: float) -> None:
        limit = int(limit_gb * 2**30)
        # Not RLIMIT_AS: address space that is only reserved (CUDA's, tcmalloc's) costs nothing.
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
        self._enough = (limit + self._resident()) // 2

    def short(self) -> bool:
        return self._resident() > self._enough

    @staticmethod
    def _resident() -> int:
        if sys.platform != "linux":
            return 0
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


def write(wire: BinaryIO, message: Ready | Began | Reply) -> None:
    wire.write(msgspec.json.encode(message) + b"\n")
    wire.flush()


def go_first() -> None:
    """On Linux: if the node runs out of memory all the same, this process ends before engine and trainer."""
    if sys.platform == "linux":
        with suppress(OSError):  # a /proc that cannot be written
            Path("/proc/self/oom_score_adj").write_text("1000")


def die_with_parent() -> None:
    """On Linux: SIGKILL when the replica goes, also while a verifier hangs and never reads stdin's end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    die_with_parent()
    go_first()
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a reward that calls input() must not eat the next sample
    try:
        setup = msgspec.json.decode(lines.readline(), type=Setup)
        rewards = prepare(setup)
        given = [spec.memory_gb for spec in setup.rewards if spec.memory_gb is not None]
        memory = Memory(max(given, default=MEMORY_GB))
        scorer = Scorer(rewards, wire, memory)
    except (Exception, SystemExit) as error:  # noqa: BLE001 -- a plugin may raise anything; the pool says it
        write(wire, Ready(error=f"{type(error).__name__}: {error}"))
        return 1
    write(wire, Ready())
    for line in lines:
        write(wire, scorer.answer(msgspec.json.decode(line, type=Request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
