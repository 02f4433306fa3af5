"""vLLM's NCCL weight-transfer engine with our frames, checksums and name check. NOT RUN on GPUs.

It keeps vLLM's communicator set-up and layerwise reload and replaces what travels: the bytes of a push
are verified per tensor before `load_weights`, and a deadline bounds every broadcast.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from hpc_rl.weights.nccl import NcclChannel
from hpc_rl.weights.store import RedisStore
from hpc_rl.weights.vllm_gloo import PushUpdateInfo, receive_and_report, refresh_tied


@dataclass(kw_only=True)
class CheckedNcclInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's own information (unique-id rendezvous) and where the report of a push goes."""

    bus_file: str
    prefix: str
    timeout_s: float


class CheckedNcclWeightTransferEngine(NCCLWeightTransferEngine):
    """Registered with vLLM as backend `hpc_rl_nccl`."""

    init_info_cls = CheckedNcclInitInfo
    update_info_cls = PushUpdateInfo
    supports_draft_weight_update = False

    _channel: NcclChannel | None = None

    @property
    def channel(self) -> NcclChannel | None:
        """The transfer group; None before the first push."""
        return self._channel

    def init_transfer_engine(self, init_info: CheckedNcclInitInfo) -> None:
        self.shutdown()
        super().init_transfer_engine(init_info)
        assert self.model_update_group is not None
        store = RedisStore.from_bus_file(init_info.bus_file, init_info.prefix, init_info.timeout_s)
        self._channel = NcclChannel(self.model_update_group, init_info.prefix, store)

    def receive_weights(self, update_info: PushUpdateInfo) -> None:
        receive_and_report(self, self._channel, update_info)

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        refresh_tied(self.model)

    def shutdown(self) -> None:
        self._channel = None
        super().shutdown()
