"""The reward `model`: a sequence classifier, or a causal model as judge."""

from __future__ import annotations

from hpc_rl.rewards.model import ModelConfig
from hpc_rl.scoring.base import ServedReward


def make(config: ModelConfig) -> ServedReward:
    """Load the model of `config`. Raises ModelError or ServedError."""
    if config.kind == "classifier":
        from hpc_rl.scoring.classifier import Classifier

        return Classifier(config)
    from hpc_rl.scoring.judge import Judge

    return Judge(config)
