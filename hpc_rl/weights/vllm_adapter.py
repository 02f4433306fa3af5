"""What vLLM's workers do with an adapter that arrives in a push: no file, no second copy of the weights.

vLLM adds the methods of `AdapterWorker` to its worker class (`worker_extension_cls`). All requests name the
one adapter below. It is blank (zeros) from the start and replaced in place at each push, while generation is
paused: requests under way go on with the new factors, as they do with new weights. A push does not go
through vLLM's `finish_weight_update`, which drops all adapters.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from hpc_rl.weights.adapter import Factors, factor_names, read_adapter
from hpc_rl.weights.protocol import WeightTransferError
from hpc_rl.weights.receiver import Receiver

ADAPTER_ID = 1
# vLLM wants a path, and opens it only for an adapter that is not installed.
REQUEST = LoRARequest("policy", ADAPTER_ID, "/received-from-the-policy")
EXTENSION = "hpc_rl.weights.vllm_adapter.AdapterWorker"


class AdapterWorker:
    """See above. `model_runner` and `weight_transfer_engine` are the worker's own."""

    model_runner: Any
    weight_transfer_engine: Any

    def add_blank_adapter(self) -> None:
        """Let requests name the adapter before the first push. It changes no number."""
        self.model_runner.lora_manager.add_dummy_lora(REQUEST, rank=1)

    def receive_adapter(self, version: int, timeout_s: float, base: str) -> dict[str, Any]:
        """Receive the push of `version` and replace the adapter; the worker's report.

        `base` is the fingerprint of the files that were loaded. Raises WeightTransferError; the old
        adapter is then still there unless another worker of the replica is what failed.
        """
        began = time.monotonic()
        deadline = began + timeout_s
        channel = self.weight_transfer_engine.channel
        if channel is None:
            raise WeightTransferError("receive_adapter before init_weight_transfer_engine")
        receiver = Receiver(channel)
        try:
            tensors = {name: t for bucket in receiver.receive(version, deadline) for name, t in bucket}
            install(self.model_runner.get_model(), read_adapter(tensors, base))
        except BaseException:
            channel.close()  # the sender sees the closed connection instead of waiting for its deadline
            raise
        receiver.finish(True, deadline)
        return {
            "tensors": receiver.tensors,
            "nbytes": receiver.nbytes,
            "seconds": time.monotonic() - began,
        }


def install(model: Any, layers: Mapping[str, Factors]) -> None:
    """Replace the adapter of `model` (vLLM's). Raises WeightTransferError for a layer without a place,
    which vLLM itself would leave out without a word, or a rank above `max_lora_rank`."""
    manager: LoRAModelManager = model.lora_manager
    config = manager.lora_config
    rank = max(factors.a.shape[0] for factors in layers.values())
    if rank > config.max_lora_rank:
        raise WeightTransferError(f"rank {rank} of the adapter is above max_lora_rank {config.max_lora_rank}")
    # The scale goes into B here, once and in fp32: vLLM would do it in the model's dtype.
    tensors = {}
    for layer, factors in layers.items():
        name_a, name_b = factor_names(layer)
        tensors[name_a], tensors[name_b] = factors.a, factors.b.float() * factors.scale
    # As vLLM reads an adapter's files; both attributes are optional in its models.
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        tensors,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=sorted(layers)),
        device="cpu",
        dtype=config.lora_dtype,  # type: ignore[arg-type]  # vLLM has made a dtype of "auto" by now
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(model, "lora_skip_prefixes", None),
    )
    places = set(manager.modules) | {part for parts in manager.packed_modules.values() for part in parts}
    homeless = sorted(set(adapter.loras) - places)
    if homeless or len(adapter.loras) != len(layers):
        raise WeightTransferError(
            f"vLLM has no place for the adapters of {', '.join(homeless[:5]) or 'some layers'}: "
            "set rollout.weights.lora to merged"
        )
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(adapter)
    manager.activate_adapter(ADAPTER_ID)


def max_lora_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that vLLM knows and that holds `rank`. Raises ValueError."""
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    allowed = [size for size in get_args(MaxLoRARanks) if size >= rank]
    if not allowed:
        raise ValueError(f"vLLM has no max_lora_rank for rank {rank}: set rollout.weights.lora to merged")
    return min(allowed)
