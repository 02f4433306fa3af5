"""Validation of preference pairs: the loss, and how often the policy prefers what was chosen."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hpc_rl.algorithms.base import TokenBatch
from hpc_rl.algorithms.dpo import Pairs
from hpc_rl.data.errors import DataError
from hpc_rl.policy.step import NO_VALIDATION, StepRunner
from hpc_rl.types import TrainSample


def evaluate_pairs(runner: StepRunner, micro_batches: Iterable[list[TrainSample]]) -> dict[str, float]:
    """Means over all pairs and ranks: `eval/loss`, and what the algorithm says of pairs (`eval/accuracy`,
    `eval/margin`, ...); `eval/pairs` counts them. Raises DataError, on all ranks, where there is none."""
    names: list[str] = []

    def of(batch: TokenBatch, log_probs: Tensor) -> Tensor:
        output = runner.algorithm.loss(batch, log_probs, None)
        names[:] = sorted(output.shares)  # with a denominator of 1 they are sums
        pairs = Pairs.of(batch, log_probs, reference=False).mask.sum()
        return torch.stack([pairs, output.loss, *(output.shares[name] for name in names)]).double()

    pairs, *sums = runner.validation_sums(micro_batches, of)
    if pairs == 0:
        raise DataError(NO_VALIDATION)
    means = (value / pairs for value in sums)
    return {f"eval/{name}": value for name, value in zip(("loss", *names), means, strict=True)} | {
        "eval/pairs": pairs
    }
