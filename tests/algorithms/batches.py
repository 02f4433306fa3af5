"""Random batches of tokens for the tests of losses, and ways to deal them out."""

from __future__ import annotations

from dataclasses import replace

import torch

from hpc_rl.algorithms.base import TokenBatch


def make_batch(
    lengths: list[int], seed: int, dtype: torch.dtype = torch.float64, *, noise: float = 0.4
) -> tuple[TokenBatch, torch.Tensor]:
    """Sequences of so many tokens, about a third of them masked, and trainer log-probs [N] that need a
    gradient; the sampler's differ from them by `noise`, the reference's by 0.3. The tokens are of versions
    0 to 3, the step began with 3 and half of it is gone."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    draw = lambda: torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    log_probs = draw() - 3
    sampler = log_probs + noise * draw()
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    advantages = torch.randn(len(lengths), generator=generator, dtype=torch.float64).to(dtype)[sequence]
    mask = (torch.rand(n, generator=generator) > 0.3).to(dtype)
    targets = torch.zeros(n, dtype=torch.long)
    batch = TokenBatch(targets, mask, sequence, len(lengths), 0.0, sampler, advantages)
    batch.reference_log_probs = log_probs + 0.3 * draw()
    batch.versions = torch.randint(0, 4, (n,), generator=generator).to(dtype)
    batch.start_version, batch.progress = 3.0, 0.5
    return batch, log_probs.requires_grad_()


def split(batch: TokenBatch, parts: list[list[int]]) -> list[tuple[TokenBatch, torch.Tensor]]:
    """The batch's sequences dealt into micro-batches; with each the indices of its tokens."""
    result = []
    for part in parts:
        index = torch.cat(
            [torch.nonzero(batch.sequence == s).flatten() for s in part] or [torch.empty(0).long()]
        )
        order = {s: i for i, s in enumerate(part)}
        sequence = torch.tensor([order[int(s)] for s in batch.sequence[index]], dtype=torch.long)
        result.append((pick(batch, index, sequence, len(part)), index))
    return result


PER_TOKEN = ("targets", "mask", "sampler_log_probs", "advantages", "reference_log_probs", "versions")


def pick(batch: TokenBatch, index: torch.Tensor, sequence: torch.Tensor, num_sequences: int) -> TokenBatch:
    """The tokens `index` alone, of so many sequences."""
    pieces = {name: getattr(batch, name)[index] for name in PER_TOKEN}
    return replace(batch, **pieces, sequence=sequence, num_sequences=num_sequences, denominator=0.0)
