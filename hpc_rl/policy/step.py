"""Forward and backward over the micro-batches of one optimizer step, and its numbers over all ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_rl.algorithms.base import Algorithm, LossOutput, TokenBatch
from hpc_rl.algorithms.chunked_head import TokenLoss, WeightedSum, Weights
from hpc_rl.data.errors import DataError
from hpc_rl.models.base import ModelAdapter
from hpc_rl.policy.batching import Fixed, PackedBatch, pack_samples
from hpc_rl.policy.reference import Reference
from hpc_rl.types import TrainSample

NO_VALIDATION = (
    "the validation rows (data.eval, or data.holdout of data.train) have no token to learn: sequences above "
    "policy.max_length are cut or dropped (overlong of their section), and one without a trained token is "
    "dropped. Raise policy.max_length or give other validation rows"
)
SampleId = tuple[int, int]  # ordinal, number of the sample of that prompt


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
    """Sums and maxima of this rank over its micro-batches; `losses` has one scalar per micro-batch.

    `counts` are known without looking at a tensor: sequences, tokens that go in, squared lengths. The sums
    in `shares` are of numbers that are divided already.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    shares: set[str] = field(default_factory=set)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    samples: list[list[SampleId]] = field(default_factory=list)

    def add(self, output: LossOutput, samples: list[TrainSample]) -> None:
        self.losses.append(output.loss.detach())
        samples = [sample for sample in samples if sample.ordinal >= 0]  # without a blank picture
        self.shares |= output.shares.keys()
        for name, value in (output.sums | output.shares).items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()
        for name, value in output.maxima.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value).detach()
        lengths = [end - first for sample in samples for first, end in sample.bounds]
        squares = sum(length * length for length in lengths)
        counted = (("sequences", len(lengths)), ("input_tokens", sum(lengths)), ("squares", squares))
        for name, count in counted:
            self.counts[name] = self.counts.get(name, 0.0) + count
        self.samples.append([(sample.ordinal, sample.sample) for sample in samples])

    def all_samples(self) -> list[SampleId]:
        return [sample for samples in self.samples for sample in samples]

    def bad_samples(self) -> list[SampleId]:
        """The samples of the micro-batches whose loss is not finite."""
        found = torch.nonzero(~torch.isfinite(torch.stack(self.losses))).flatten().tolist()
        return [sample for number in found for sample in self.samples[number]]


@dataclass
class Reduced:
    """A step's numbers over all ranks: `sums` (with the counts and `loss`), `maxima`, the gradient's norm.

    `bad_ranks` had a loss that is not finite. `shares` are the sums that are no totals over tokens.
    """

    sums: dict[str, float]
    maxima: dict[str, float]
    grad_norm: float
    bad_ranks: list[int]
    shares: frozenset[str] = frozenset()

    @property
    def finite(self) -> bool:
        return not self.bad_ranks and math.isfinite(self.grad_norm)

    def metrics(self) -> dict[str, float]:
        """By slash name. Sums of the algorithm become means over the trained tokens."""
        totals = ("loss", "tokens", "sequences", "input_tokens")
        tokens = max(self.sums["tokens"], 1.0)
        found = {f"train/{name}": self.sums[name] for name in totals} | {"train/grad_norm": self.grad_norm}
        for name, value in self.sums.items():
            if name not in totals and name != "squares":
                found[f"train/{name}"] = value if name in self.shares else value / tokens
        if square := found.pop("train/importance_square", 0.0):
            # Kish: how many of the tokens, weighted by exp(l - m), are worth as much; 1 is on-policy.
            found["train/ess"] = found["train/importance_mean"] ** 2 / square
        return found | {f"train/{name}": value for name, value in self.maxima.items()}


class StepRunner:
    """Runs the micro-batches of this rank; gradients add up in the parameters."""

    def __init__(
        self,
        model: ModelAdapter,
        algorithm: Algorithm,
        ranks: Ranks,
        sharded: bool,
        reference: Reference | None = None,
    ) -> None:
        self.model, self.algorithm, self.ranks, self.sharded = model, algorithm, ranks, sharded
        self.reference = reference

    def forward_backward(
        self, micro_batches: list[list[TrainSample]], denominator: float, fixed: list[Fixed] | None = None
    ) -> Totals:
        """Gradients of all micro-batches, and the totals of this rank; `fixed` has what was made of each
        before the step. Waits for no number of the device."""
        totals = Totals()
        for number, samples in enumerate(micro_batches):
            if self.sharded:
                # HSDP: replicas agree once, after the last micro-batch.
                self.model.module.set_requires_all_reduce(number == len(micro_batches) - 1)
            batch = self.pack(samples, denominator, fixed[number] if fixed is not None else None)
            output = self.algorithm.loss(batch.tokens, *self._log_probs(batch))
            # FSDP averages over the data-parallel ranks; our shares of the loss add up.
            (output.loss * (self.ranks.data_parallel if self.sharded else 1)).backward()
            totals.add(output, samples)
        return totals

    def pack(self, samples: list[TrainSample], denominator: float, fixed: Fixed | None = None) -> PackedBatch:
        """The row of `samples`, with the log-probs of the reference if there is one."""
        placeholders = self.model.placeholders
        batch = pack_samples(samples, denominator, self.ranks.device, placeholders=placeholders)
        if fixed is not None:
            fixed.fill(batch.tokens)
        if self.reference is not None and batch.tokens.reference_log_probs is None:
            batch.tokens.reference_log_probs = self.reference.log_probs(batch)
        return batch

    def _log_probs(self, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        algorithm, tokens = self.algorithm, batch.tokens
        # Where they are known the head makes its gradients in the forward, which saves one of its products.
        weights: Weights | None = None
        if isinstance(algorithm, WeightedSum):
            weights = algorithm.log_prob_weights(tokens)
        elif isinstance(algorithm, TokenLoss) and algorithm.token_level:
            weights = functools.partial(algorithm.token_gradient, tokens)
        return self.model.log_probs(batch.row, algorithm.temperature, algorithm.needs_entropy, weights)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[list[TrainSample]]) -> dict[str, float]:
        """Mean negative log-likelihood per trained token, over all ranks; every rank has equally many
        micro-batches. Raises DataError, on all ranks, where there is no such token: a loss of 0 would be the
        best one for good."""

        def of(batch: TokenBatch, log_probs: Tensor) -> Tensor:
            kept = torch.where(batch.mask > 0, log_probs, torch.zeros_like(log_probs))
            return torch.stack([kept.double().sum(), batch.mask.double().sum()])

        total, tokens = self.validation_sums(micro_batches, of)
        if tokens == 0:
            raise DataError(NO_VALIDATION)
        loss = -total / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"eval/loss": loss, "eval/perplexity": perplexity, "eval/tokens": tokens}

    @torch.no_grad()
    def validation_sums(
        self, micro_batches: Iterable[list[TrainSample]], of: Callable[[TokenBatch, Tensor], Tensor]
    ) -> list[float]:
        """`of(tokens, log_probs)` of every micro-batch, added up over all ranks, which have equally many.

        The tokens' denominator is 1. Gradients, RNG and the optimizer stay as they are. Raises DataError
        where there is none."""
        sums: Tensor | None = None
        module = self.model.module
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else []
        module.eval()
        with torch.random.fork_rng(devices):
            for samples in micro_batches:
                batch = self.pack(samples, 1.0)
                found = of(batch.tokens, self._log_probs(batch)[0])
                sums = found if sums is None else sums + found
        if self.sharded:
            module.reshard()  # a forward without backward leaves the root's parameters whole
        module.train()
        if sums is None:
            raise DataError(NO_VALIDATION)
        if self.ranks.world_size > 1:
            dist.all_reduce(sums)
        totals: list[float] = (sums / self.ranks.tp).tolist()
        return totals

    def reduce(self, totals: Totals, norm: Tensor) -> Reduced:
        """Totals over all ranks. The one point of a step where the host waits for the device."""
        ranks = self.ranks
        names, tops = sorted(totals.sums), sorted(totals.maxima)
        losses = torch.stack(totals.losses)
        flags = torch.zeros(ranks.world_size, dtype=torch.float64, device=ranks.device)
        flags[ranks.rank] = (~torch.isfinite(losses)).any().double()
        counts = torch.tensor(list(totals.counts.values()), dtype=torch.float64).to(ranks.device)
        own = torch.stack([*(totals.sums[name] for name in names), losses.double().sum()])
        # The ranks of one tensor-parallel group count the same tokens.
        sums = torch.cat([own / ranks.tp, counts / ranks.tp, flags])
        largest = torch.stack([totals.maxima[name].double() for name in tops]) if tops else sums[:0]
        if ranks.world_size > 1:
            dist.all_reduce(sums)
            if tops:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        values = torch.cat([sums, largest, norm.double().reshape(1).to(sums.device)]).tolist()
        keys = [*names, "loss", *totals.counts]
        after = len(keys) + ranks.world_size
        return Reduced(
            sums=dict(zip(keys, values, strict=False)),
            maxima=dict(zip(tops, values[after:], strict=False)),
            grad_norm=values[-1],
            bad_ranks=[rank for rank, flag in enumerate(values[len(keys) : after]) if flag],
            shares=frozenset(totals.shares),
        )

    def gather_samples(self, samples: list[SampleId]) -> list[SampleId]:
        """Those of all ranks, without repeats. A collective; for the words of a failure."""
        ranks = self.ranks
        if ranks.world_size == 1:
            return sorted(set(samples))
        count = torch.tensor([len(samples)], device=ranks.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        own = torch.full((int(count), 2), -1, dtype=torch.int64, device=ranks.device)
        if samples:
            own[: len(samples)] = torch.tensor(samples, device=ranks.device)
        everyone = [torch.empty_like(own) for _ in range(ranks.world_size)]
        dist.all_gather(everyone, own)
        found = {(int(a), int(b)) for part in everyone for a, b in part.tolist()}
        return sorted(found - {(-1, -1)})
