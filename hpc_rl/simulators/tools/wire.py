"""What the pool and a host of tools say to each other: one msgspec JSON object per line, no pickle."""

from __future__ import annotations

from typing import Any

import msgspec


class Setup(msgspec.Struct):
    """The first line to a host: the recipe's list of tools, and the run's plugins with their folder."""

    tools: list[dict[str, Any]]
    plugins: list[str] = []
    code: str = ""
    memory_gb: float = 4.0


class Ready(msgspec.Struct):
    """The host's answer to `Setup`: the tools' schemas, or why it cannot work."""

    error: str = ""
    schemas: list[dict[str, Any]] = []


class Request(msgspec.Struct):
    number: int
    tool: str
    arguments: dict[str, Any]


class Reply(msgspec.Struct):
    """`text` is for the policy. With `retire` the process is to be replaced: it holds too much memory."""

    number: int
    text: str
    failed: bool = False
    retire: bool = False
