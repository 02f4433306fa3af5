"""Which transport a run uses, and the policy's sender made from recipe and plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_rl.plan.memory import auto_transport
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
        return auto_transport(recipe.rollout.weights, fits_nccl)
    if wanted == "nccl" and not fits_nccl:
        raise ValueError(
            "rollout.weights.transport: nccl needs GPUs on policy and rollout and the vllm engine; "
            "use gloo or auto"
        )
    return wanted


def keeps_copies(recipe: Recipe, plan: Plan) -> bool:
    """Whether rank 0 and the replicas keep a copy of the weights on the host, so that pushes overlap with the
    next step and with generation (`rollout.weights.overlap`), or hold what changed (`mode: delta`).

    Raises ValueError where one of these was asked for and the transport is another than gloo.
    """
    assert recipe.rollout is not None
    sync = recipe.rollout.weights
    on_host = transport_name(recipe, plan) == "gloo"
    if (sync.overlap or sync.mode == "delta") and not on_host:
        raise ValueError("rollout.weights.overlap and mode delta need the transport gloo")
    return on_host and (sync.mode == "delta" or sync.overlap is not False)


def load_transport(name: str) -> Any:
    """The transport class called `name` (`sender`, `vllm_backend`, `init_info` or `join`)."""
    return registry("transports").load(name)


def make_sender(recipe: Recipe, plan: Plan, bus_file: Path | str, attempt: int) -> Sender:
    """Policy rank 0's sender."""
    name = transport_name(recipe, plan)
    assert recipe.rollout is not None
    sync, parallel = recipe.rollout.weights, recipe.rollout.parallel
    options: dict[str, bool] = {}
    if keeps_copies(recipe, plan):
        options = {"keep": True, "changes": sync.mode == "delta" and sync.lora != "adapter"}
    sender: Sender = load_transport(name).sender(
        bus_file,
        attempt=attempt,
        workers=parallel.tp * parallel.pp,
        bucket_bytes=sync.bucket_mb << 20,
        timeout_s=sync.timeout_s,
        **options,
    )
    return sender
