"""What the pool and a scorer process say to each other: one msgspec JSON object per line, no pickle."""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_rl.rewards.base import RewardSpec


class Setup(msgspec.Struct):
    """The first line to a scorer: which rewards, and the run's plugins with the folder of their code."""

    rewards: list[RewardSpec]
    plugins: list[str] = []
    code: str = ""


class Ready(msgspec.Struct):
    """The scorer's answer to `Setup`; `error` says why it cannot work."""

    error: str = ""


class Request(msgspec.Struct):
    number: int
    prompt: str
    response: str
    answer: str | None
    fields: dict[str, Any] = {}


class Reply(msgspec.Struct):
    """`scores` by reward key; `error` (then no scores) says which reward failed and why."""

    number: int
    scores: dict[str, float] = {}
    error: str = ""
