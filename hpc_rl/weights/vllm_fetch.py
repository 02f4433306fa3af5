"""What vLLM's workers do to take a push in while they generate: `begin_fetch` of their transfer engine.

vLLM adds the method of `FetchWorker` to its worker class (`worker_extension_cls`); its own weight-transfer
calls are for a model that stands still.
"""

from __future__ import annotations

from typing import Any

EXTENSION = "hpc_rl.weights.vllm_fetch.FetchWorker"


class FetchWorker:
    """`weight_transfer_engine` is the worker's own, of `vllm_gloo`."""

    weight_transfer_engine: Any

    def fetch_weights(self, version: int, timeout_s: float, init_info: dict[str, Any]) -> None:
        """Begin to receive the push of `version` into host memory, and return."""
        self.weight_transfer_engine.begin_fetch(version, timeout_s, init_info)
