"""The default process group of the policy ranks, met over the run's password-protected Redis."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from hpc_rl.policy.trainer import TrainerContext
from hpc_rl.weights.store import RedisStore

# Longer than any step: a dead rank is found by the controller's heartbeats, this ends the hang itself.
COLLECTIVE_LIMIT_S = 1800.0
MEET_LIMIT_S = 300.0


def local_device(context: TrainerContext) -> torch.device:
    """The GPU of this rank, or the CPU when the plan gives it none."""
    if context.plan.group("policy").gpus_per_task == 0:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise RuntimeError(
            "the plan gives each policy rank a GPU, but torch sees none on this node; "
            "check the driver and CUDA_VISIBLE_DEVICES (or the site's gres settings)"
        )
    local = int(os.environ.get("SLURM_LOCALID", context.rank % context.plan.group("policy").tasks_per_node))
    device = torch.device("cuda", 0 if count == 1 else local)
    torch.cuda.set_device(device)
    return device


def join(context: TrainerContext, device: torch.device) -> dist.Store:
    """Make the default group: gloo for CPU tensors, and NCCL for those of a GPU. Returns its store,
    which must live as long as the group. Raises DistStoreError naming what was waited for."""
    store: dist.Store
    if context.bus_file is None or context.world_size == 1:
        assert context.world_size == 1
        store = dist.HashStore()
    else:
        prefix = f"policy:{context.attempt}:{context.incarnation}"
        store = RedisStore.from_bus_file(context.bus_file, prefix, MEET_LIMIT_S)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=context.rank,
        world_size=context.world_size,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT_S),
    )
    return store


def data_store(context: TrainerContext) -> RedisStore | None:
    """Where the ranks tell each other about their data, beside any group; None for one rank."""
    if context.bus_file is None or context.world_size == 1:
        return None
    prefix = f"data:{context.attempt}:{context.incarnation}"
    return RedisStore.from_bus_file(context.bus_file, prefix, MEET_LIMIT_S)
