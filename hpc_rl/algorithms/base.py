"""What a policy loss is: the tokens it gets, what it gives back, and the protocol of an algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from hpc_rl.algorithms.denominators import AGGREGATIONS, step_denominator


@dataclass
class TokenBatch:
    """The trained positions of one micro-batch, flattened to N predicted tokens.

    All tensors have shape [N]; position n predicts `targets[n]`. `mask` is 1.0 where token n counts.
    `sequence` numbers the sequence that token n belongs to (0 .. num_sequences - 1). `denominator` is that
    of the whole optimizer step, over all ranks and micro-batches, counted after every mask
    (`algorithms.denominators`). `reference_log_probs` are those of the model that a KL penalty holds to;
    `proximal_log_probs` those of the trainer at the start of the step, where a batch has several;
    `teacher_log_probs` those of the teacher (NaN without one). `versions` are those of the weights that
    sampled the tokens; the trainer's are `start_version`, and `progress` more (a part of one) within the
    step's updates."""

    targets: Tensor
    mask: Tensor
    sequence: Tensor
    num_sequences: int
    denominator: float
    sampler_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    reference_log_probs: Tensor | None = None
    proximal_log_probs: Tensor | None = None
    teacher_log_probs: Tensor | None = None
    versions: Tensor | None = None
    start_version: float = 0.0
    progress: float = 0.0


def rows_of(batch: TokenBatch, rows: slice) -> TokenBatch:
    """The tokens `rows` alone, with the denominator of all."""
    values = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return replace(batch, **{n: v[rows] for n, v in values.items() if isinstance(v, Tensor)})


@dataclass
class LossOutput:
    """`loss` is this micro-batch's share of the step's loss: shares add up, they are not averaged.

    `sums` are totals over tokens (the trainer adds them up over micro-batches and ranks and divides
    by the summed `tokens`), `maxima` are combined by maximum, and `shares` add up to what they are, as the
    loss does. All are detached scalars.
    """

    loss: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)


class Algorithm(Protocol):
    """A policy loss as a pure function; no I/O and no collectives.

    With `needs_reference` batches come with `reference_log_probs`.
    """

    temperature: float
    needs_entropy: bool
    needs_reference: bool

    def loss(self, batch: TokenBatch, log_probs: Tensor, entropy: Tensor | None) -> LossOutput:
        """The loss of trainer log-probs [N] (fp32, with graph) and, if asked for, entropies [N]."""
        ...


def drop_unusable(mask: Tensor, *values: Tensor | None) -> Tensor:
    """`mask` without the tokens for which any of `values` is not finite."""
    for value in values:
        if value is not None:
            mask = mask * torch.isfinite(value).to(mask.dtype)
    return mask


def tokens_per_sequence(mask: Tensor, batch: TokenBatch) -> Tensor:
    """How many tokens of each sequence [num_sequences] count."""
    return mask.new_zeros(batch.num_sequences).index_add_(0, batch.sequence, mask)


def token_weights(mask: Tensor, batch: TokenBatch, aggregation: str) -> Tensor:
    """Each token's weight in the loss [N], so that the step's loss is sum(weight * token loss).

    `sequence_mean`: mask / (tokens of the token's sequence * denominator); all others: mask / denominator,
    and the denominator is what tells them apart. A sequence is never split over micro-batches.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"unknown loss aggregation {aggregation!r}; known: {', '.join(AGGREGATIONS)}")
    denominator = batch.denominator or 1.0  # 0: nothing counts, and 0 / 0 would be NaN
    if aggregation != "sequence_mean":
        return mask / denominator
    counts = tokens_per_sequence(mask, batch)
    return mask / (counts.clamp(min=1.0)[batch.sequence] * denominator)


def loss_denominator(batches: list[TokenBatch], aggregation: str, loss_length: int | None = None) -> float:
    """The denominator of a step made of `batches`: what `TokenBatch.denominator` must hold."""
    counts: list[float] = []
    for batch in batches:
        mask = drop_unusable(batch.mask, batch.sampler_log_probs)
        counts += tokens_per_sequence(mask, batch).tolist()
    return step_denominator(counts, aggregation, loss_length)
