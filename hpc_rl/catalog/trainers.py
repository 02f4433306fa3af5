"""What the built-in trainers can shard by, for the plan to refuse before anything is queued (no torch)."""

from __future__ import annotations

# trainer -> dimensions of policy.parallel that may exceed 1; a plugin's trainer is not limited here
MESH_DIMENSIONS: dict[str, frozenset[str]] = {"fsdp2": frozenset({"dp_replicate", "dp_shard", "tp"})}


def unsupported_dimensions(trainer: str, parallel: dict[str, int]) -> list[str]:
    """The dimensions above 1 that `trainer` cannot shard by."""
    allowed = MESH_DIMENSIONS.get(trainer)
    if allowed is None:
        return []
    return [name for name, size in parallel.items() if size > 1 and name not in allowed]
