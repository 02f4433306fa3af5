"""Which keys of a recipe may change when a run is resumed, and why the others may not."""

from __future__ import annotations

from typing import Any

# key or `section.*` -> what a change does. Everything else defines the run: its data order, its
# gradient or its numbers would differ from what the checkpoint continues.
MAY_CHANGE: dict[str, str] = {
    "cluster.*": "where and how long it runs: partition, nodes, time, account, image, variables, secrets",
    "policy.steps": "train longer or shorter",
    "policy.epochs": "train longer or shorter",
    "policy.parallel.*": "another mesh; the checkpoint is resharded when it is loaded",
    "policy.micro_batch_tokens": "memory use; the gradient is the same however the batch is split (not with "
    "`policy.batch_tokens`: there it makes the steps)",
    "policy.micro_batch_size": "memory use; the gradient is the same however the batch is split",
    "policy.activation_checkpointing": "memory against time",
    "policy.cpu_offload": "memory against time",
    "policy.guard.*": "when to stop a run that goes wrong",
    "policy.profile.*": "which steps to profile",
    "data.workers": "threads that read ahead",
    "teacher.batch_tokens": "memory of the teacher's processes",
    "teacher.limit_s": "how long a batch of the teacher may take",
    "rollout.replicas": "more or fewer rollout engines",
    "rollout.parallel.*": "GPUs per rollout engine",
    "rollout.max_in_flight": "prompt groups per replica",
    "rollout.max_model_len": "memory of the rollout engine",
    "rollout.weights.*": "how weights travel",
    "rollout.engine_options.*": "options of the rollout engine",
    "checkpoint.*": "when to save, how many to keep, what to export",
    "eval.*": "when and how to evaluate (not `only`, `checkpoint`)",
    "logging.*": "W&B",
}


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `a.b.c` -> value; lists are values."""
    if not isinstance(data, dict):
        return {prefix: data}
    if not data:
        return {prefix: {}} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """key -> (old, new) of everything that differs between two resolved recipes."""
    before, after = flatten(old), flatten(new)
    keys = [*before, *(key for key in after if key not in before)]
    return {k: (before.get(k), after.get(k)) for k in keys if before.get(k) != after.get(k)}


def may_change(key: str) -> bool:
    return key in MAY_CHANGE or any(
        rule.endswith(".*") and (key == rule[:-2] or key.startswith(rule[:-1])) for rule in MAY_CHANGE
    )


def refusals(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """key -> why, of everything that differs between two resolved recipes and may not."""
    differences = changes(old, new)
    found = {key: "" for key in differences if not may_change(key)}
    only = "a run that trains and one that evaluates are two runs: `hpc-rl eval`"
    found |= {key: only for key in ("eval.only", "eval.checkpoint") if key in differences}
    rows = "policy.micro_batch_tokens"
    if rows in differences and old.get("policy", {}).get("batch_tokens") is not None:
        found[rows] = "with policy.batch_tokens it says which sequences make a step"
    return found


def table_text() -> str:
    """The table as printed with an error."""
    width = max(len(key) for key in MAY_CHANGE)
    return "\n".join(f"  {key:{width}}  {why}" for key, why in MAY_CHANGE.items())
