"""What the pool and a scorer process say to each other: one msgspec JSON object per line, no pickle."""

from __future__ import annotations

from typing import Any

import msgspec

from hpc_rl.rewards.base import RewardSpec, SampleInfo


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
    sample: SampleInfo | None = None


class Began(msgspec.Struct, tag="began"):
    """The reward `key` runs from now on: its deadline starts, and what happens until the next line is its."""

    number: int
    key: str


class Reply(msgspec.Struct, tag="reply"):
    """`scores` by reward key, `errors` of the rewards that failed. With `retire` the process is to be
    replaced: it holds so much memory that the next sample would be short of it."""

    number: int
    scores: dict[str, float] = {}
    errors: dict[str, str] = {}
    retire: bool = False
