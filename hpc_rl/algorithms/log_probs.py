"""Log-probabilities of given tokens from logits, in fp32, without an fp32 copy of all logits.

log p(y) = z_y / T - logsumexp(z / T) with z cast to fp32 row block by row block. A log-softmax in bf16
is wrong by up to whole nats, and an fp32 copy of N x V logits (plus the same again for the gradient)
is what runs a learner out of memory; so forward keeps the logits as they came, and backward writes the
gradient softmax - onehot block by block. torch's own softmax does each block in one pass, which is what
makes this faster than `cross_entropy` on a CPU (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Elements of a block: on a CPU what a cache holds, on a GPU enough to be worth a kernel (128 MiB of fp32).
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


def token_log_probs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`(log_probs [N], entropy [N] or None)` of `targets` [N] under softmax(logits [N, V] / temperature).

    Results are fp32 (fp64 for fp64 logits), the entropy in nats; both have a gradient. Raises ValueError
    for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    log_probs, entropy = _TokenLogProbs.apply(logits, targets, float(temperature), with_entropy)
    return log_probs, entropy if with_entropy else None


def block_rows(logits: Tensor) -> int:
    """How many rows of `logits` a block has."""
    elements = BLOCK_ELEMENTS["cpu" if logits.device.type == "cpu" else "cuda"]
    return max(1, elements // max(1, logits.shape[1]))


def _row_blocks(logits: Tensor) -> list[slice]:
    rows = block_rows(logits)
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What softmax is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled(block: Tensor, temperature: float) -> Tensor:
    """The block over the temperature, in at least fp32; at 1 as it is: softmax itself reads it as wide."""
    return block if temperature == 1.0 else block.to(wide_dtype(block.dtype)) / temperature


def entropy_slope(p: Tensor) -> Tensor:
    """dH / dz [N, V] of the entropy H of p = softmax(z): -p (log p + H)."""
    terms = torch.special.entr(p)
    return terms.addcmul_(p, terms.sum(1, keepdim=True), value=-1.0)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        dtype = wide_dtype(logits.dtype)
        n = logits.shape[0]
        log_probs = torch.empty(n, dtype=dtype, device=logits.device)
        entropy = torch.empty(n if with_entropy else 0, dtype=dtype, device=logits.device)
        for rows in _row_blocks(logits):
            block = torch.log_softmax(_scaled(logits[rows], temperature), dim=-1, dtype=dtype)
            log_probs[rows] = block.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            if with_entropy:
                p = torch.exp(block)
                # A logit of -inf has p = 0 and adds nothing, but 0 * inf would be NaN.
                entropy[rows] = -torch.where(p > 0, p * block, torch.zeros_like(p)).sum(-1)
        ctx.save_for_backward(logits, targets)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)  # an entropy that is only a metric costs nothing here
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, targets = ctx.saved_tensors
        if grad is None:
            grad = logits.new_zeros(len(logits), dtype=wide_dtype(logits.dtype))
        result = torch.empty_like(logits)
        dtype = wide_dtype(logits.dtype)
        in_place = logits.dtype == dtype  # else the block is made wide, and rounded at the end
        for rows in _row_blocks(logits):
            # d log p_y / d z_j = (1[j = y] - p_j) / T
            scale = (grad[rows] / ctx.temperature).unsqueeze(1)
            block = result[rows] if in_place else torch.empty_like(logits[rows], dtype=dtype)
            torch.softmax(_scaled(logits[rows], ctx.temperature), -1, dtype=dtype, out=block)
            bonus = None if by_entropy is None else entropy_slope(block)
            block.mul_(-scale)
            if bonus is not None and by_entropy is not None:
                block.addcmul_(bonus, (by_entropy[rows] / ctx.temperature).unsqueeze(1))
            block.scatter_add_(1, targets[rows].unsqueeze(1), scale)
            if not in_place:
                result[rows] = block
        return result, None, None, None
