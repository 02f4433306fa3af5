"""What a recipe may say under `rollout.engine_options`, per engine. Torch-free."""

from __future__ import annotations

from pydantic import Field

from hpc_rl.recipe.schema import Positive, Section


class VllmOptions(Section):
    """Options of vLLM's engine; null means vLLM's own default."""

    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    max_num_seqs: Positive | None = None
    max_num_batched_tokens: Positive | None = None
    kv_cache_memory_gb: float | None = Field(None, gt=0)


class HfOptions(Section):
    """Options of the Transformers engine."""

    threads: Positive | None = None
