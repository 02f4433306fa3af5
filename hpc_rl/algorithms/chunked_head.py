"""Log-probabilities of given tokens from the last hidden states: the output head, chunk of rows by chunk.

Logits of N positions over V tokens, and their gradient, are what a learner's memory goes into. Here they
exist for one chunk of rows at a time. With z = cap(scale * (h W^T + b)) / T, p = softmax(z), a loss whose
gradient by the log-probs is g, and D = (p - onehot(y)) * cap':

    d loss / d h_n = -g_n (scale / T) D_n W        d loss / d W = -(scale / T) sum_n D_n^T (g_n h_n)

The first could be scaled when g is known, the second is a sum over rows and could not. So there are two ways:

- any loss, of the entropies as well: backward makes the logits of each chunk again (4 matrix products
  instead of 3);
- `weights`, for a loss whose g is known in the forward but for a common factor: beforehand, where it is a
  weighted sum of log-probs, or as soon as a chunk's log-probs are, where it is a sum of losses of single
  tokens. Then forward makes the gradients too, and backward multiplies them with that factor.

Softmax, log-probs and the sum over chunks of the weight's gradient are fp32 (fp64 for fp64), whatever the
dtype of the hidden states and of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hpc_rl.algorithms import log_probs as unchunked
from hpc_rl.algorithms.base import TokenBatch
from hpc_rl.algorithms.log_probs import entropy_slope, wide_dtype

# Logits of a chunk: enough rows that each matrix product runs at its full speed (32 MiB of fp32 on a CPU,
# 256 MiB of bf16 on a GPU), because the weight's gradient is read and written once per chunk.
CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


@runtime_checkable
class WeightedSum(Protocol):
    """An algorithm whose loss is a multiple of sum(weights * log_probs), and which knows the weights."""

    def log_prob_weights(self, batch: TokenBatch) -> Tensor:
        """The weights [N]; 0 where a token does not count."""
        ...


@runtime_checkable
class TokenLoss(Protocol):
    """An algorithm whose loss may be a sum over tokens, each term of which needs its own log-prob alone."""

    @property
    def token_level(self) -> bool:
        """Whether it is, with these options."""
        ...

    def token_gradient(self, batch: TokenBatch, rows: slice, log_probs: Tensor) -> Tensor:
        """d loss / d log-probs [n] of the tokens `rows` of the batch, given their log-probs [n]."""
        ...


# The loss's g but for a factor: [N], or made of the log-probs [n] of the rows that a slice names.
Weights = Tensor | Callable[[slice, Tensor], Tensor]


@dataclass(frozen=True)
class Head:
    """`weight` [V, H] and `bias` [V] of the output layer, and what makes logits of its product x:
    x * scale, then `soft_cap` * tanh(x / soft_cap) if there is a cap (Gemma 2, arXiv:2408.00118)."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def product(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """hidden W^T + b, in the first rows of `buffer`."""
        out = buffer[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


def finish(
    product: Tensor, scale: float, soft_cap: float | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """`(z, slope)` of what the layer gives: logits over the temperature, in at least fp32, and the derivative
    of the soft cap if there is one."""
    wide = product.to(wide_dtype(product.dtype))
    if soft_cap is None:
        factor = scale / temperature
        return (wide if factor == 1.0 else wide * factor), None
    bent = torch.tanh(wide * (scale / soft_cap))
    return bent * (soft_cap / temperature), 1 - bent * bent


def chunked_log_probs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    weights: Weights | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`(log_probs [N], entropy [N] or None)` of `targets` [N] after hidden [N, H]; see `token_log_probs`.

    With `weights` the gradients are made in the forward. They are right only for a loss whose gradient by
    the log-probs is c * weights, for one number c; for any other the gradients are NaN. They can be used
    once. Raises ValueError for a temperature that is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    known = weights if torch.is_grad_enabled() else None
    log_probs, entropy = _ChunkedLogProbs.apply(
        hidden, head.weight, head.bias, targets, known, head, float(temperature), with_entropy
    )
    return log_probs, entropy if with_entropy else None


def chunk_rows(rows: int, vocabulary: int, device: torch.device) -> int:
    """Rows of a chunk: as many as `CHUNK_ELEMENTS` allows, spread evenly."""
    elements = CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    chunks = math.ceil(rows / max(1, elements // vocabulary))
    return math.ceil(rows / max(1, chunks))


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Weights | None,
        head: Head,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.facts, ctx.temperature, ctx.made = (head.scale, head.soft_cap), temperature, None
        if weights is None:
            ctx.save_for_backward(hidden, weight, bias, targets)
        else:
            ctx.made = _Gradients(head, hidden, ctx.needs_input_grad, weights, temperature)
        ctx.set_materialize_grads(False)  # an entropy that is only a metric costs nothing in backward
        found = _walk(head, hidden, targets, temperature, with_entropy, ctx.made)
        if ctx.made is not None:
            ctx.save_for_backward(ctx.made.by_log_probs)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, by_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            made, ctx.made = ctx.made, None
            if made is None:
                raise RuntimeError("gradients that were made in the forward can be used only once")
            if grad is None or by_entropy is not None:
                raise RuntimeError("gradients made in the forward are for a loss of the log-probs alone")
            made.multiply(_common_factor(grad, ctx.saved_tensors[0]))
        else:
            hidden, weight, bias, targets = ctx.saved_tensors
            head = Head(weight, bias, *ctx.facts)
            if grad is None:
                grad = hidden.new_zeros(len(hidden), dtype=wide_dtype(hidden.dtype))
            made = _Gradients(head, hidden, ctx.needs_input_grad, grad, ctx.temperature, by_entropy)
            _walk(head, hidden, targets, ctx.temperature, False, made)
        return made.hidden, made.weight, made.bias, None, None, None, None, None


class _Gradients:
    """Those of the hidden states, the weight and the bias, added up chunk by chunk; None where `needed`
    [hidden, weight, bias] says so. `by_log_probs` [N] is the loss's gradient by the log-probs, `by_entropy`
    [N] by the entropies, if it has any."""

    def __init__(
        self,
        head: Head,
        rows: Tensor,
        needed: tuple[bool, ...],
        by_log_probs: Weights,
        temperature: float,
        by_entropy: Tensor | None = None,
    ) -> None:
        self.head, self.rows, self.constant = head, rows, -head.scale / temperature
        sums = {"dtype": wide_dtype(rows.dtype), "device": rows.device}
        self.make = None if isinstance(by_log_probs, Tensor) else by_log_probs
        given = by_log_probs if isinstance(by_log_probs, Tensor) else rows.new_zeros(len(rows))
        self.by_log_probs = given.to(sums["dtype"])
        # Both gradients differ from row to row, so that they are put into D, and nothing is left outside.
        self.by_entropy = None if by_entropy is None else by_entropy.to(sums["dtype"])
        self.hidden = torch.empty_like(rows) if needed[0] else None
        self.weight = torch.zeros(head.weight.shape, **sums) if needed[1] else None
        with_bias = head.bias is not None and needed[2]
        self.bias = torch.zeros(len(head.weight), **sums) if with_bias else None

    def difference(self, at: slice, p: Tensor, index: Tensor) -> Tensor:
        """D of the rows `at` before the soft cap, of which p [n, V] is the softmax; may be in its place."""
        bonus = None if self.by_entropy is None else entropy_slope(p)
        p.scatter_add_(1, index, p.new_full(index.shape, -1.0))
        if self.by_entropy is None or bonus is None:
            return p
        by_log_probs, by_entropy = (v[at].unsqueeze(1) for v in (self.by_log_probs, self.by_entropy))
        return p.mul_(by_log_probs).addcmul_(bonus, by_entropy, value=-1.0)

    def add(self, chunk: slice, difference: Tensor, log_probs: Tensor) -> None:
        """Of the rows `chunk`, whose D is `difference`, given their log-probs."""
        if self.make is not None:
            self.by_log_probs[chunk] = self.make(chunk, log_probs)
        outside = self.by_log_probs[chunk]
        factor = (outside if self.by_entropy is None else torch.ones_like(outside)) * self.constant
        if self.hidden is not None:
            self.hidden[chunk] = torch.mm(difference, self.head.weight) * factor.unsqueeze(1)
        if self.weight is not None:
            scaled = (self.rows[chunk] * factor.unsqueeze(1)).to(difference.dtype)
            _add_product(self.weight, difference.t(), scaled)
        if self.bias is not None:
            self.bias += torch.mv(difference.t(), factor.to(difference.dtype))

    def multiply(self, factor: Tensor) -> None:
        for gradient in (self.hidden, self.weight, self.bias):
            if gradient is not None:
                gradient.mul_(factor)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without rounding the product to the dtype of its factors first."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _walk(
    head: Head,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    with_entropy: bool,
    gradients: _Gradients | None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [N or 0], and `gradients` filled, chunk by chunk in one buffer."""
    (n, _), vocabulary = hidden.shape, len(head.weight)
    rows = chunk_rows(n, vocabulary, hidden.device)
    dtype, device = wide_dtype(hidden.dtype), hidden.device
    log_probs = torch.empty(n, dtype=dtype, device=device)
    entropy = torch.empty(n if with_entropy else 0, dtype=dtype, device=device)
    buffer = hidden.new_empty((rows, vocabulary))
    for start in range(0, n, max(1, rows)):
        chunk = slice(start, min(n, start + rows))
        logits = head.product(hidden[chunk], buffer)
        for block in _blocks(logits):
            at = slice(start + block.start, start + block.stop)
            z, slope = finish(logits[block], head.scale, head.soft_cap, temperature)
            index = targets[at].unsqueeze(1)
            p = torch.softmax(z, dim=-1)
            # The largest p is 1 / sum(exp(z - max)). What is subtracted first is near, so nothing cancels.
            log_probs[at] = z.gather(1, index).squeeze(1) - z.amax(1) + p.amax(1).log()
            if with_entropy:
                entropy[at] = torch.special.entr(p).sum(1)
            if gradients is not None:
                d = gradients.difference(at, p, index)
                logits[block] = d if slope is None else d.mul_(slope)
        if gradients is not None:
            gradients.add(chunk, logits, log_probs[chunk])
    return log_probs, entropy


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of a chunk that a cache holds; on a CPU one for each thread at least, which share out rows."""
    rows = unchunked.block_rows(logits)
    if logits.device.type == "cpu":
        rows = max(rows, torch.get_num_threads())
    for start in range(0, len(logits), rows):
        yield slice(start, min(len(logits), start + rows))


def _common_factor(grad: Tensor, weights: Tensor) -> Tensor:
    """The c of grad = c * weights; NaN where there is none. (An error would have to wait for the device.)"""
    weights = weights.to(grad.dtype)
    factor = (grad @ weights) / (weights @ weights).clamp(min=torch.finfo(grad.dtype).tiny)
    rest = (grad - factor * weights).abs().sum()
    return torch.where(rest <= 1e-4 * grad.abs().sum(), factor, torch.full_like(factor, math.nan))
