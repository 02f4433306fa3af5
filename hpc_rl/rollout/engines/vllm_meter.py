"""What vLLM's scheduler says of its queue and its cache, through vLLM's interface for stat loggers."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from hpc_rl.types import EngineLoad


class Meter(StatLoggerBase):
    """Keeps the newest numbers. vLLM calls `record` after each step of its engine."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.load = EngineLoad()

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        preempted = iteration_stats.num_preempted_reqs if iteration_stats is not None else 0
        if scheduler_stats is not None:
            self.load = EngineLoad(
                running=scheduler_stats.num_running_reqs,
                waiting=scheduler_stats.num_waiting_reqs,
                kv_used=scheduler_stats.kv_cache_usage,
                preempted=self.load.preempted + preempted,
            )

    def log_engine_initialized(self) -> None:
        return None
