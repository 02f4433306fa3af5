"""What a recipe may say under `rollout.engine_options`. No torch: read at submission."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hpc_rl.recipe.schema import Positive, Section


class VllmOptions(Section):
    """Options of the `vllm` engine. `extra` holds any further `AsyncEngineArgs` by vLLM's own names."""

    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    enable_prefix_caching: bool = True
    enforce_eager: bool | None = None
    """null: eager on CPU, CUDA graphs and compilation on GPUs."""
    cpu_kv_cache_gb: Positive = 1
    """Size of the KV cache when vLLM runs on CPUs."""
    extra: dict[str, Any] = {}


class HfOptions(Section):
    """Options of the `hf` engine."""

    device: str | None = None
    """null: a GPU if there is one."""
    threads: Positive | None = None
    """CPU threads of torch; null: torch's own choice."""
