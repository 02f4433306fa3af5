"""One scorer process: `python -m hpc_rl.rewards.scorer`, lines in on stdin, lines out on stdout.

It is separate so that it can be killed: a verifier that hangs or crashes costs one sample, not the
replica. What rewards print goes to stderr, for stdout is the wire.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from hpc_rl.recipe.plugins import import_plugins
from hpc_rl.rewards.base import RewardSpec, Score, checked, make_reward
from hpc_rl.rewards.wire import Ready, Reply, Request, Setup

_PR_SET_PDEATHSIG = 1


def prepare(setup: Setup) -> list[tuple[RewardSpec, Score]]:
    """Import the plugins and make the rewards."""
    if setup.plugins:
        import_plugins(setup.plugins, Path(setup.code))
        sys.path.insert(0, setup.code)
    return [(spec, make_reward(spec)) for spec in setup.rewards]


def answer(request: Request, rewards: list[tuple[RewardSpec, Score]]) -> Reply:
    """Score one sample. A reward's exception becomes the reply's error."""
    scores: dict[str, float] = {}
    for spec, score in rewards:
        try:
            value = score(request.prompt, request.response, request.answer, request.fields)
            scores[spec.key] = checked(spec, value)
        except Exception as error:  # noqa: BLE001 -- user code: anything may come, and goes into the reply
            return Reply(request.number, error=f"reward {spec.key!r}: {type(error).__name__}: {error}")
    return Reply(request.number, scores)


def _write(wire: BinaryIO, message: Ready | Reply) -> None:
    wire.write(msgspec.json.encode(message) + b"\n")
    wire.flush()


def _die_with_parent() -> None:
    """On Linux: SIGKILL when the replica goes, also while a verifier hangs and never reads stdin's end."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    _die_with_parent()
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    lines = sys.stdin.buffer
    try:
        rewards = prepare(msgspec.json.decode(lines.readline(), type=Setup))
    except Exception as error:  # noqa: BLE001 -- a plugin may raise anything; the pool reports it
        _write(wire, Ready(error=f"{type(error).__name__}: {error}"))
        return 1
    _write(wire, Ready())
    for line in lines:
        _write(wire, answer(msgspec.json.decode(line, type=Request), rewards))
    return 0


if __name__ == "__main__":
    sys.exit(main())
