"""The NCCL transport: weights between GPU memories, through vLLM's own NCCL weight-transfer pieces.

NOT RUN: no machine with two GPUs was at hand. The frames, checksums and name checks are those of the
gloo transport (`protocol.py`), which runs; what is untested is the code of this module that touches a
GPU. The communicator is vLLM's `PyNcclCommunicator`; it is made from a unique id that travels over the
bus Redis, so no rendezvous port is opened. NCCL itself has no deadlines: we poll an event and abort.
"""

from __future__ import annotations

import base64
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpc_rl.weights.buffers import BufferPool
from hpc_rl.weights.protocol import WeightTransferError
from hpc_rl.weights.sender import BroadcastSender
from hpc_rl.weights.store import RedisStore

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

UNIQUE_ID_KEY = "nccl_unique_id"
POLL_S = 0.001


class NcclChannel:
    """A transfer group over a `PyNcclCommunicator`; rank 0 is the policy."""

    def __init__(self, communicator: PyNcclCommunicator, prefix: str, store: RedisStore) -> None:
        self._communicator: PyNcclCommunicator | None = communicator
        self._prefix = prefix
        self.store = store
        self.device = torch.device(communicator.device)
        self.buffers = BufferPool(self.device)

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> None:
        communicator = self._open()
        communicator.broadcast(tensor, src=0, stream=torch.cuda.current_stream(self.device))
        self._wait("broadcast", timeout_s)

    def sum(self, tensor: torch.Tensor, timeout_s: float) -> None:
        communicator = self._open()
        total = communicator.all_reduce(tensor, stream=torch.cuda.current_stream(self.device))
        self._wait("allreduce", timeout_s)
        tensor.copy_(total)

    def _open(self) -> PyNcclCommunicator:
        if self._communicator is None:
            raise WeightTransferError(f"transfer group {self._prefix} is closed")
        return self._communicator

    def _wait(self, name: str, timeout_s: float) -> None:
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))
        deadline = time.monotonic() + timeout_s
        while not done.query():
            if time.monotonic() > deadline:
                self.close()
                raise WeightTransferError(
                    f"{name} in transfer group {self._prefix}: {timeout_s:.0f} s passed"
                )
            time.sleep(POLL_S)

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.destroy()
            self._communicator = None


def publish_unique_id(store: RedisStore, unique_id: bytes) -> None:
    """The policy's side of the rendezvous."""
    store.set(UNIQUE_ID_KEY, base64.b64encode(unique_id))


def worker_init_info(bus_file: Path | str, prefix: str, workers: int, timeout_s: float) -> dict[str, Any]:
    """The replica's side: what vLLM's `init_weight_transfer_engine` is given.

    Waits for the policy's unique id. Raises DistStoreError when it does not come in `timeout_s`.
    """
    unique_id = RedisStore.from_bus_file(bus_file, prefix, timeout_s).get(UNIQUE_ID_KEY)
    return {
        "bus_file": str(bus_file),
        "prefix": prefix,
        "timeout_s": timeout_s,
        "rank_offset": 1,
        "world_size": workers + 1,
        "nccl_unique_id_b64": unique_id.decode(),
    }


def open_sender_channel(bus_file: Path | str, prefix: str, workers: int, timeout_s: float) -> NcclChannel:
    """Mint and publish a unique id and join as rank 0, within `timeout_s`."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    store = RedisStore.from_bus_file(bus_file, prefix, timeout_s)
    unique_id = bytes(NCCLLibrary().ncclGetUniqueId().internal)
    publish_unique_id(store, unique_id)
    made: list[PyNcclCommunicator] = []
    device = torch.cuda.current_device()

    def join() -> None:
        torch.cuda.set_device(device)
        made.append(uid_init_process_group(unique_id, 0, workers + 1, device))

    # ncclCommInitRank waits for its peers without a deadline; a daemon thread makes one.
    thread = threading.Thread(target=join, name=f"nccl-join-{prefix}", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not made:
        raise WeightTransferError(
            f"transfer group {prefix}: the replica did not join within {timeout_s:.0f} s"
        )
    return NcclChannel(made[0], prefix, store)


class NcclTransport:
    """Registered as transport `nccl`. Needs vLLM in the policy's environment too."""

    name = "nccl"
    vllm_backend = "hpc_rl_nccl"

    @staticmethod
    def sender(
        bus_file: Path | str, *, attempt: int, workers: int, bucket_bytes: int, timeout_s: float
    ) -> BroadcastSender:
        def open_channel(prefix: str, limit_s: float) -> NcclChannel:
            return open_sender_channel(bus_file, prefix, workers, limit_s)

        return BroadcastSender(
            open_channel,
            attempt=attempt,
            device=torch.device("cuda", torch.cuda.current_device()),
            bucket_bytes=bucket_bytes,
            timeout_s=timeout_s,
        )

    @staticmethod
    def init_info(bus_file: Path | str, prefix: str, workers: int, timeout_s: float) -> dict[str, Any]:
        """Arguments of vLLM's `init_weight_transfer_engine`."""
        return worker_init_info(bus_file, prefix, workers, timeout_s)
