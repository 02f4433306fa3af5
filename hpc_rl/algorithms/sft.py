"""Supervised fine-tuning: mean cross-entropy over the completion tokens of the optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_rl.algorithms.base import LossOutput, TokenBatch, token_weights
from hpc_rl.algorithms.config import SftConfig


class Sft:
    """`Algorithm` of that name: loss = -sum(mask * log p) / tokens of the step."""

    needs_entropy = False
    needs_reference = False
    temperature = 1.0

    def __init__(self, config: SftConfig | None = None) -> None:
        self.config = config or SftConfig()

    def log_prob_weights(self, batch: TokenBatch) -> Tensor:
        """See `algorithms.chunked_head.WeightedSum`."""
        return token_weights(batch.mask, batch, "token_mean")

    def loss(self, batch: TokenBatch, log_probs: Tensor, entropy: Tensor | None = None) -> LossOutput:
        kept = torch.where(batch.mask > 0, log_probs, torch.zeros_like(log_probs))
        weights = self.log_prob_weights(batch)
        # An all-masked micro-batch still has a graph: the other ranks wait for its backward.
        loss = -(weights * kept).sum() + kept.sum() * 0.0
        return LossOutput(loss, {"tokens": batch.mask.sum(), "log_prob_mean": kept.detach().sum()})
