"""Which transport a run uses, and the policy's sender made from recipe and plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_rl.plan.schema import Plan
from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.schema import Recipe
from hpc_rl.weights.protocol import Sender


def transport_name(recipe: Recipe, plan: Plan) -> str:
    """`rollout.weights.transport`, with `auto` worked out: nccl from GPUs into vLLM, else gloo.

    Raises ValueError for a run without rollout, or nccl without GPUs on both sides.
    """
    if recipe.rollout is None:
        raise ValueError("a recipe without 'rollout' moves no weights")
    wanted = recipe.rollout.weights.transport
    gpus = min(plan.group("policy").gpus_per_task, plan.group("rollout").gpus_per_task)
    fits_nccl = gpus > 0 and recipe.rollout.engine == "vllm"
    if wanted == "auto":
        return "nccl" if fits_nccl else "gloo"
    if wanted == "nccl" and not fits_nccl:
        raise ValueError(
            "rollout.weights.transport: nccl needs GPUs on policy and rollout and the vllm engine; "
            "use gloo or auto"
        )
    return wanted


def load_transport(name: str) -> Any:
    """The transport class called `name` (`sender`, `vllm_backend`, `init_info` or `join`)."""
    return registry("transports").load(name)


def make_sender(recipe: Recipe, plan: Plan, bus_file: Path | str, attempt: int) -> Sender:
    """Policy rank 0's sender."""
    name = transport_name(recipe, plan)
    assert recipe.rollout is not None
    sync, parallel = recipe.rollout.weights, recipe.rollout.parallel
    sender: Sender = load_transport(name).sender(
        bus_file,
        attempt=attempt,
        workers=parallel.tp * parallel.pp,
        bucket_bytes=sync.bucket_mb << 20,
        timeout_s=sync.timeout_s,
    )
    return sender
