"""What a step's loss is divided by. Torch-free: the controller counts it over all ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterable

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant_length")


def step_denominator(
    tokens_per_sequence: Iterable[float], aggregation: str, loss_length: int | None = None
) -> float:
    """The denominator of a step whose sequences have so many trained tokens each.

    `token_mean`: all tokens. `sequence_mean` and `sequence_sum`: sequences with a token.
    `constant_length`: those sequences times `loss_length` (Dr. GRPO). Raises ValueError.
    """
    counts = [float(count) for count in tokens_per_sequence]
    sequences = float(sum(1 for count in counts if count > 0))
    if aggregation == "token_mean":
        return sum(counts)
    if aggregation in ("sequence_mean", "sequence_sum"):
        return sequences
    if aggregation != "constant_length":
        raise ValueError(f"unknown loss aggregation {aggregation!r}; known: {', '.join(AGGREGATIONS)}")
    if loss_length is None:
        raise ValueError("loss aggregation constant_length needs a length to divide by (loss_length)")
    return sequences * loss_length
