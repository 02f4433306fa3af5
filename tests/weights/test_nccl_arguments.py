"""What of the NCCL transport can be checked without a GPU: arguments, rendezvous data, registration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from hpc_rl.weights.nccl import publish_unique_id, worker_init_info
from hpc_rl.weights.store import RedisStore
from hpc_rl.weights.vllm_plugin import ENGINES, register

pytestmark = [pytest.mark.redis, pytest.mark.vllm, pytest.mark.timeout(120)]


def test_unique_id_reaches_vllms_own_init_info(bus_file: Path) -> None:
    from hpc_rl.weights.vllm_nccl import CheckedNcclInitInfo

    unique_id = bytes(range(128))
    publish_unique_id(RedisStore.from_bus_file(bus_file, "nccl", 2.0), unique_id)
    arguments = worker_init_info(bus_file, "nccl", workers=4, timeout_s=2.0)
    info = CheckedNcclInitInfo(**arguments)  # vLLM validates the id here
    assert info.nccl_unique_id_bytes == unique_id
    assert (info.world_size, info.rank_offset) == (5, 1)
    assert bus_file.read_text().split('"password": "')[1][:32] not in str(arguments)


def test_the_replica_waits_no_longer_than_told(bus_file: Path) -> None:
    with pytest.raises(dist.DistStoreError, match="nccl_unique_id"):
        worker_init_info(bus_file, "nobody", workers=1, timeout_s=0.2)


def test_engines_are_registered_once_and_can_be_imported() -> None:
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    register()
    register()
    for name in ENGINES:
        engine = WeightTransferEngineFactory._registry[name]()
        assert issubclass(engine, WeightTransferEngine)
        assert not getattr(engine, "__abstractmethods__", None)
