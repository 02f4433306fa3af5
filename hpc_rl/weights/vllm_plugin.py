"""vLLM's plugin entry point (`vllm.general_plugins`): names our weight-transfer engines.

vLLM calls `register` in every process of an engine, the workers included. The engines' modules are
imported only when an engine is configured with one of these backends.
"""

from __future__ import annotations

ENGINES = {
    "hpc_rl_gloo": ("hpc_rl.weights.vllm_gloo", "GlooWeightTransferEngine"),
    "hpc_rl_nccl": ("hpc_rl.weights.vllm_nccl", "CheckedNcclWeightTransferEngine"),
}

_registered: set[str] = set()


def register() -> None:
    """Add the engines to vLLM's factory. vLLM may call a plugin more than once per process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    for name, (module, class_name) in ENGINES.items():
        if name not in _registered:
            WeightTransferEngineFactory.register_engine(name, module, class_name)
            _registered.add(name)
