"""Random batches of tokens for the tests of losses, and ways to deal them out."""

from __future__ import annotations

import torch

from hpc_rl.algorithms.base import TokenBatch


def make_batch(
    lengths: list[int], seed: int, dtype: torch.dtype = torch.float64, *, noise: float = 0.4
) -> tuple[TokenBatch, torch.Tensor]:
    """Sequences of so many tokens, about a third of them masked, and trainer log-probs [N] that need a
    gradient; the sampler's differ from them by `noise`."""
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
        pieces = [t[index] for t in (batch.sampler_log_probs, batch.advantages)]
        micro = TokenBatch(batch.targets[index], batch.mask[index], sequence, len(part), 0.0, *pieces)
        result.append((micro, index))
    return result
