"""How full a rollout engine is, as it says itself."""

from __future__ import annotations

import msgspec


class EngineLoad(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`running` and `waiting` count answers (a prompt group has `group_size`); `waiting` have no place in the
    engine's batch yet. `kv_used` is the share of the key-value cache in use (0 where there is none to
    run out of), `preempted` how often an answer lost its place there since the engine started."""

    running: int = 0
    waiting: int = 0
    kv_used: float = 0.0
    preempted: int = 0
