"""Log-probabilities of given tokens from logits, in fp32, without an fp32 copy of all logits.

log p(y) = z_y / T - logsumexp(z / T) with z cast to fp32 row block by row block. A log-softmax in bf16
is wrong by up to whole nats, and an fp32 copy of N x V logits (plus the same again for the gradient)
is what runs a learner out of memory; so forward keeps the logits as they came and one number per
row, and backward writes the gradient softmax - onehot block by block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 22  # 16 MiB of fp32 per block


def token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`(log_probs [N], entropy [N] or None)` of `targets` [N] under softmax(logits [N, V] / temperature).

    Results are fp32 (fp64 for fp64 logits). The entropy, in nats, carries no gradient. Raises
    ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_probs, entropy = _TokenLogProbs.apply(logits, targets, float(temperature), with_entropy)
    return log_probs, entropy if with_entropy else None


def _row_blocks(logits: Tensor) -> list[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def _wide(block: Tensor, temperature: float) -> Tensor:
    """The block over the temperature in at least fp32 (a new tensor whenever it is not the same)."""
    block = block if block.dtype == torch.float64 else block.float()
    return block if temperature == 1.0 else block / temperature


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        n = logits.shape[0]
        normalizer = torch.empty(n, dtype=dtype, device=logits.device)
        log_probs = torch.empty(n, dtype=dtype, device=logits.device)
        entropy = torch.empty(n if with_entropy else 0, dtype=dtype, device=logits.device)
        for rows in _row_blocks(logits):
            block = _wide(logits[rows], temperature)
            normalizer[rows] = torch.logsumexp(block, dim=-1)
            chosen = block.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            log_probs[rows] = chosen - normalizer[rows]
            if with_entropy:
                p = torch.exp(block - normalizer[rows].unsqueeze(1))
                # A logit of -inf has p = 0 and adds nothing, but 0 * inf would be NaN.
                weighted = torch.where(p > 0, p * block, torch.zeros_like(p))
                entropy[rows] = normalizer[rows] - weighted.sum(-1)
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, normalizer = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            # d log p_y / d z_j = (1[j = y] - p_j) / T
            scale = (grad[rows] / ctx.temperature).unsqueeze(1)
            block = torch.exp(_wide(logits[rows], ctx.temperature) - normalizer[rows].unsqueeze(1))
            block.mul_(-scale)
            block.scatter_add_(1, targets[rows].unsqueeze(1), scale)
            result[rows] = block
        return result, None, None, None
