"""Forward and backward over the micro-batches of one optimizer step, and its numbers over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_rl.algorithms.base import Algorithm, LossOutput
from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.models.base import ModelAdapter
from hpc_rl.policy.batching import PackedBatch, pack_samples
from hpc_rl.policy.trainer import NonFiniteError
from hpc_rl.types import TrainSample


@dataclass(frozen=True)
class Ranks:
    """Where this process is: `data_parallel` ranks see different data, the `tp` ranks of a group the same."""

    rank: int
    world_size: int
    data_parallel: int
    tp: int
    device: torch.device


@dataclass
class Totals:
    """Sums and maxima of this rank over its micro-batches, and the samples whose loss is not finite."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def add(self, output: LossOutput, sequences: int) -> None:
        for name, value in output.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()
        for name, value in output.maxima.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value).detach()
        count = torch.tensor(float(sequences), dtype=torch.float64, device=output.loss.device)
        self.sums["sequences"] = self.sums.get("sequences", 0.0) + count


class StepRunner:
    """Runs the micro-batches of this rank; gradients add up in the parameters."""

    def __init__(self, model: ModelAdapter, algorithm: Algorithm, ranks: Ranks, sharded: bool) -> None:
        self.model, self.algorithm, self.ranks, self.sharded = model, algorithm, ranks, sharded

    def forward_backward(self, micro_batches: list[list[TrainSample]], denominator: float) -> Totals:
        """Gradients of all micro-batches, and the totals of this rank."""
        totals, losses = Totals(), []
        for number, samples in enumerate(micro_batches):
            if self.sharded:
                # HSDP: replicas agree once, after the last micro-batch.
                self.model.module.set_requires_all_reduce(number == len(micro_batches) - 1)
            output = self._loss(pack_samples(samples, denominator, self.ranks.device))
            # FSDP averages over the data-parallel ranks; our shares of the loss add up.
            (output.loss * (self.ranks.data_parallel if self.sharded else 1)).backward()
            losses.append(output.loss.detach())
            totals.add(output, len(samples))
        stacked = torch.stack(losses)
        totals.sums["loss"] = stacked.double().sum()
        totals.bad = [
            f"{sample.ordinal}.{sample.sample}"
            for number in torch.nonzero(~torch.isfinite(stacked)).flatten().tolist()
            for sample in micro_batches[number]
        ]
        return totals

    def _loss(self, batch: PackedBatch) -> LossOutput:
        logits = self.model.logits(batch.input_ids, batch.position_ids, batch.keep, batch.media)
        log_probs, entropy = token_log_probs(
            logits, batch.tokens.targets, self.algorithm.temperature, self.algorithm.needs_entropy
        )
        return self.algorithm.loss(batch.tokens, log_probs, entropy)

    def reduce(self, totals: Totals, norm: Tensor, step: int) -> dict[str, float]:
        """Totals over all ranks as metrics. Raises NonFiniteError on every rank if any has a bad loss."""
        ranks = self.ranks
        names, tops = sorted(totals.sums), sorted(totals.maxima)
        flags = torch.zeros(ranks.world_size, dtype=torch.float64, device=ranks.device)
        flags[ranks.rank] = float(bool(totals.bad))
        # The ranks of one tensor-parallel group count the same tokens.
        sums = torch.cat([torch.stack([totals.sums[name] for name in names]) / ranks.tp, flags])
        largest = torch.stack([totals.maxima[name].double() for name in tops]) if tops else sums[:0]
        if ranks.world_size > 1:
            dist.all_reduce(sums)
            if tops:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        values = dict(zip(names, sums.tolist(), strict=False))
        grad_norm = float(norm)
        culprits = torch.nonzero(sums[len(names) :]).flatten().tolist()
        if culprits or not math.isfinite(grad_norm):
            what = f"samples {', '.join(totals.bad[:16])}" if totals.bad else f"policy rank(s) {culprits}"
            if not culprits:
                what = "the gradient only (the losses are finite)"
            raise NonFiniteError(f"step {step}: the loss is not finite; in {what}")
        tokens = max(values["tokens"], 1.0)
        metrics = {"train/loss": values["loss"], "train/grad_norm": grad_norm}
        metrics["train/tokens"] = values["tokens"]
        metrics["train/sequences"] = values["sequences"]
        for name in names:
            if name not in ("loss", "tokens", "sequences"):
                metrics[f"train/{name}"] = values[name] / tokens
        metrics |= {f"train/{name}": value for name, value in zip(tops, largest.tolist(), strict=True)}
        return metrics
