"""The gloo transport: weights over TCP between CPU memories. Works everywhere; slow for large models.

A transfer group is a raw `ProcessGroupGloo` (policy rank 0 and the workers of one replica) that lives
beside any default process group and meets over the bus Redis. A dead peer's closed connection is an
error at once; a silent one is an error at the deadline. Set GLOO_SOCKET_IFNAME to choose the network.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc_rl.weights.buffers import BufferPool
from hpc_rl.weights.protocol import WeightTransferError
from hpc_rl.weights.sender import BroadcastSender
from hpc_rl.weights.store import RedisStore


class GlooChannel:
    """One transfer group; rank 0 is the policy. Raises WeightTransferError when a peer fails."""

    device = torch.device("cpu")

    def __init__(self, bus_file: Path | str, prefix: str, rank: int, size: int, timeout_s: float) -> None:
        self._prefix = prefix
        self.buffers = BufferPool(self.device)
        # The group's C++ side calls the store again: both references live as long as the channel.
        self.store = RedisStore.from_bus_file(bus_file, prefix, timeout_s)
        self._group: dist.ProcessGroupGloo | None
        try:
            self._group = dist.ProcessGroupGloo(self.store, rank, size, timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise WeightTransferError(f"transfer group {prefix}: {error}") from error

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        self._run("broadcast", [tensor], options, timeout_s)

    def sum(self, tensor: torch.Tensor, timeout_s: float) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM
        self._run("allreduce", [tensor], options, timeout_s)

    def _run(
        self,
        name: str,
        tensors: list[torch.Tensor],
        options: dist.BroadcastOptions | dist.AllreduceOptions,
        timeout_s: float,
    ) -> None:
        if self._group is None:
            raise WeightTransferError(f"transfer group {self._prefix} is closed")
        if timeout_s <= 0:
            raise WeightTransferError(f"the deadline passed before a {name} of {self._prefix}")
        options.timeout = timedelta(seconds=timeout_s)
        try:
            if isinstance(options, dist.BroadcastOptions):
                work = self._group.broadcast(tensors, options)
            else:
                work = self._group.allreduce(tensors, options)
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            self.close()
            raise WeightTransferError(f"{name} in transfer group {self._prefix}: {error}") from error

    def close(self) -> None:
        """Leave the group (closes its connections, so that peers do not wait for their deadline)."""
        self._group = None


class GlooTransport:
    """Registered as transport `gloo`."""

    name = "gloo"
    vllm_backend = "hpc_rl_gloo"

    @staticmethod
    def sender(
        bus_file: Path | str,
        *,
        attempt: int,
        workers: int,
        bucket_bytes: int,
        timeout_s: float,
        keep: bool = False,
        changes: bool = False,
    ) -> BroadcastSender:
        """The sender of policy rank 0. `workers` is tp * pp of each replica."""

        def open_channel(prefix: str, limit_s: float) -> GlooChannel:
            return GlooChannel(bus_file, prefix, 0, workers + 1, limit_s)

        return BroadcastSender(
            open_channel,
            attempt=attempt,
            device=torch.device("cpu"),
            bucket_bytes=bucket_bytes,
            timeout_s=timeout_s,
            keep=keep,
            changes=changes,
        )

    @staticmethod
    def init_info(bus_file: Path | str, prefix: str, workers: int, timeout_s: float) -> dict[str, Any]:
        """Arguments of vLLM's `init_weight_transfer_engine`. Names the bus file, not its content."""
        return {"bus_file": str(bus_file), "prefix": prefix, "workers": workers, "timeout_s": timeout_s}

    @staticmethod
    def join(bus_file: Path | str, prefix: str, worker: int, workers: int, timeout_s: float) -> GlooChannel:
        """Worker `worker` of a replica joins its transfer group."""
        return GlooChannel(bus_file, prefix, worker + 1, workers + 1, timeout_s)
