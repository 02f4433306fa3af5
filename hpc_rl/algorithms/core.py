"""What all policy-gradient losses are made of: ratios, surrogates, corrections, KL, and their numbers.

With l = trainer log-prob (graph), m = log-prob recorded by the sampler, p = proximal log-prob, A = advantage,
sg = no gradient, every algorithm's loss (to be minimised) is

    sum over tokens  weight * ( -c * gain(r, A)  -  positive_nll * [A > 0] * l  +  kl_beta * KL
                                -  entropy_beta * entropy )

    weight   mask over the step's denominator (`base.token_weights`)
    r        exp(l - p) of the token, or of its sequence (mean of l - p); p = m (`proximal: sampler`), l at
             the start of the step (`recompute`), or between m and sg(l) by versions (`interpolate`)
    gain     `clipped` or `truncated` below: what an algorithm chooses
    c        the off-policy correction: weight and mask of rho = exp(p - m), without gradient

`proximal: sampler` takes the ratio against the policy that really made the token: it corrects staleness and
the sampler's numerics and bounds the step at once, so no weight comes on top (it would count twice), but
masks do, of rho = exp(sg(l) - m). Nothing here is one algorithm's own, does I/O or talks to other ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_rl.algorithms.base import LossOutput, TokenBatch, drop_unusable, rows_of, token_weights
from hpc_rl.algorithms.config import Correction, RlConfig

MAX_K3 = 10.0  # one token that the policy all but ruled out would outweigh a whole step
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far outside any clip, and still finite in fp32 when squared


@dataclass(frozen=True)
class Tokens:
    """A micro-batch as surrogates see it: all [N], and 0 where the mask is 0. Only `current` has a graph."""

    current: Tensor
    sampler: Tensor
    proximal: Tensor
    advantages: Tensor
    mask: Tensor
    sequence: Tensor
    num_sequences: int

    def sequence_mean(self, values: Tensor) -> Tensor:
        """For each token [N] the mean of `values` [N] over its sequence's tokens."""
        mask = self.mask.to(values.dtype)
        empty = values.new_zeros(self.num_sequences)
        counts = empty.index_add(0, self.sequence, mask).clamp(min=1.0)
        totals = empty.index_add(0, self.sequence, values * mask)
        return (totals / counts)[self.sequence]


@dataclass(frozen=True)
class Surrogate:
    """What is maximised, per token: `gain` (with graph), the `ratio` it is of, and where it is bounded."""

    gain: Tensor
    ratio: Tensor
    clipped: Tensor


SurrogateOf = Callable[[Tokens], Surrogate]


def usable_tokens(batch: TokenBatch, log_probs: Tensor, proximal: str) -> Tokens:
    """The tokens that count: those in the mask whose sampler log-prob is finite.

    For `proximal: recompute` without log-probs of the start of the step, `log_probs` themselves are those:
    right for one optimizer step per batch.
    """
    assert batch.sampler_log_probs is not None
    assert batch.advantages is not None
    mask = drop_unusable(batch.mask, batch.sampler_log_probs)
    kept, zero = mask > 0, torch.zeros_like(log_probs)
    # Masked values may be -inf or NaN; `where` on the inputs keeps them out of the gradient too.
    current = torch.where(kept, log_probs, zero)
    sampler = torch.where(kept, batch.sampler_log_probs, zero)
    if proximal == "sampler":
        against = sampler
    elif proximal == "interpolate":
        against = torch.lerp(sampler, current.detach(), interpolation(batch, current))
    else:
        start = batch.proximal_log_probs
        against = current.detach() if start is None else torch.where(kept, start, zero)
    advantages = torch.where(kept, batch.advantages, zero)
    return Tokens(current, sampler, against, advantages, mask, batch.sequence, batch.num_sequences)


def interpolation(batch: TokenBatch, like: Tensor) -> Tensor:
    """alpha [N] of p = m + alpha (sg(l) - m): how much of the way from the weights that sampled a token,
    version v, to the present ones was gone when the step began: (v_p - v) / (v_p + progress - v) (AReaL,
    arXiv:2505.24298).

    1 before the first update, where p = l, whatever the version: on-policy tokens have 0 / 0 there. A token
    that the weights of the step's start sampled has 0 after it: those weights are its proximal policy."""
    if batch.progress == 0 or batch.versions is None:
        return torch.ones_like(like)
    age = (batch.start_version - batch.versions.to(like.dtype)).clamp(min=0.0)
    return age / (age + batch.progress)


# --- ratios ------------------------------------------------------------------------------------------
def bounded_exp(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def token_ratio(tokens: Tokens) -> Tensor:
    """r = exp(l - p), token by token."""
    return bounded_exp(tokens.current - tokens.proximal)


def sequence_ratio(tokens: Tokens) -> Tensor:
    """GSPO's s = exp(mean over the sequence of l - p), as sg(s) * exp(l - sg(l)): the same value at every
    token of a sequence, and each token's own gradient (GSPO-token, arXiv:2507.18071)."""
    current = tokens.current
    mean = tokens.sequence_mean(current.detach() - tokens.proximal)
    return bounded_exp(mean) * torch.exp(current - current.detach())


# --- surrogates --------------------------------------------------------------------------------------
def clipped(tokens: Tokens, ratio: Tensor, low: float, high: float, dual_clip: float) -> Surrogate:
    """PPO's min(r A, clip(r, 1 - low, 1 + high) A), and at least `dual_clip` * A where A < 0 (Ye et al. 2019,
    arXiv:1912.09729): without that floor a token that became likelier has a loss without bound."""
    advantages = tokens.advantages
    bounded = ratio.clamp(1 - low, 1 + high)
    gain = torch.minimum(ratio * advantages, bounded * advantages)
    floored = torch.where(advantages < 0, torch.maximum(gain, dual_clip * advantages), gain)
    too_high = (advantages > 0) & (ratio > 1 + high)
    too_low = (advantages < 0) & (ratio < 1 - low)
    return Surrogate(floored, ratio, too_high | too_low | (floored > gain))


def truncated(tokens: Tokens, ratio: Tensor, cap: float) -> Surrogate:
    """sg(min(r, cap)) A l: every token keeps a gradient, with a weight of at most `cap`."""
    gain = ratio.detach().clamp(max=cap) * tokens.advantages * tokens.current
    return Surrogate(gain, ratio, (ratio > cap) & (tokens.advantages != 0))


# --- off-policy corrections -----------------------------------------------------------------------------
def _tis(tokens: Tokens, log_rho: Tensor, options: Correction) -> tuple[Tensor, Tensor]:
    return bounded_exp(log_rho).clamp(max=options.cap), torch.ones_like(log_rho)


def _icepop(tokens: Tokens, log_rho: Tensor, options: Correction) -> tuple[Tensor, Tensor]:
    rho = bounded_exp(log_rho)
    return rho, _within(rho, options)


def _sequence_mask(tokens: Tokens, log_rho: Tensor, options: Correction) -> tuple[Tensor, Tensor]:
    weight, _ = _tis(tokens, log_rho, options)
    return weight, _within(bounded_exp(tokens.sequence_mean(log_rho)), options)


def _none(tokens: Tokens, log_rho: Tensor, options: Correction) -> tuple[Tensor, Tensor]:
    return torch.ones_like(log_rho), torch.ones_like(log_rho)


def _within(rho: Tensor, options: Correction) -> Tensor:
    low, high = options.bounds
    return ((rho >= low) & (rho <= high)).to(rho.dtype)


# kind -> (weight, mask) of rho = exp(p - m)
CORRECTIONS = {"tis": _tis, "icepop": _icepop, "sequence_mask": _sequence_mask, "none": _none}


@torch.no_grad()
def correction(tokens: Tokens, config: RlConfig) -> tuple[Tensor, Tensor]:
    """`(factor [N] of each token's gain, mask [N] of the tokens it leaves in)`; see the module."""
    separate = config.proximal != "sampler"
    log_rho = (tokens.proximal if separate else tokens.current) - tokens.sampler
    weight, kept = CORRECTIONS[config.correction.kind](tokens, log_rho, config.correction)
    if config.off_policy_mask is not None:
        # DeepSeek-V3.2: a bad answer that the policy has left behind teaches nothing and destabilises.
        behind = tokens.sequence_mean(tokens.sampler - tokens.current) > config.off_policy_mask
        kept = kept * (~(behind & (tokens.advantages < 0))).to(kept.dtype)
    return (weight * kept if separate else kept), kept


# --- KL to a reference ------------------------------------------------------------------------------
def kl_penalty(estimator: str, current: Tensor, reference: Tensor) -> Tensor:
    """An estimate per token [N] of KL(policy || reference) from tokens of the policy (d = reference - l).

    `k1` -d, `k2` d^2 / 2, `k3` exp(d) - d - 1 (Schulman 2020, "Approximating KL divergence"). k1's gradient
    is 0 on average: it belongs into a reward. k3 is unbiased and never negative, but its gradient is not the
    KL's; k2's is. `k3_k2` has the value of k3 and the gradient of k2.
    """
    d = (reference - current).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -d
    k2, k3 = d.square() / 2, (torch.exp(d) - d - 1).clamp(max=MAX_K3)
    found = {"k2": k2, "k3": k3, "k3_k2": k2 + (k3 - k2).detach()}
    if estimator not in found:
        raise ValueError(f"unknown KL estimator {estimator!r}; known: k1, {', '.join(found)}")
    return found[estimator]


# --- the loss --------------------------------------------------------------------------------------------
def policy_loss(
    batch: TokenBatch,
    log_probs: Tensor,
    config: RlConfig,
    surrogate: SurrogateOf,
    *,
    entropy: Tensor | None = None,
) -> LossOutput:
    """This micro-batch's share of the loss at the top of this file, for trainer log-probs [N] with graph."""
    tokens = usable_tokens(batch, log_probs, config.proximal)
    weights = token_weights(tokens.mask, batch, config.loss_aggregation)
    found = surrogate(tokens)
    factor, kept = correction(tokens, config)
    loss = -(weights * factor * found.gain).sum()
    if config.positive_nll > 0:
        good = (tokens.advantages > 0).to(weights.dtype)
        loss = loss - config.positive_nll * (weights * good * tokens.current).sum()
    if config.entropy_beta > 0:
        assert entropy is not None
        loss = loss - config.entropy_beta * (weights * torch.where(tokens.mask > 0, entropy, 0.0)).sum()
    penalty = None
    if config.kl_beta > 0:
        of = tokens.sampler if config.penalised_rewards else tokens.current
        penalty = reference_penalty(batch, of, tokens.mask, config)
        if not config.penalised_rewards:
            loss = loss + config.kl_beta * (weights * penalty).sum()
    # An all-masked micro-batch still has a graph: the other ranks wait for its backward.
    loss = loss + tokens.current.sum() * 0.0
    sums, maxima = _statistics(tokens, found, kept, entropy)
    if penalty is not None:
        sums["kl_reference"] = (penalty.detach() * tokens.mask).sum()
    return LossOutput(loss, sums, maxima)


def reference_penalty(batch: TokenBatch, of: Tensor, mask: Tensor, config: RlConfig) -> Tensor:
    """The KL estimate of each token [N] from log-probs `of` the policy, 0 where the mask is 0."""
    assert batch.reference_log_probs is not None
    # What the reference cannot score is not penalised.
    usable = (mask > 0) & ~torch.isnan(batch.reference_log_probs)
    reference = torch.where(usable, batch.reference_log_probs.to(of.dtype), of.detach())
    return kl_penalty(config.estimator, of, reference) * usable.to(of.dtype)


@torch.no_grad()
def _statistics(
    tokens: Tokens, found: Surrogate, kept: Tensor, entropy: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Totals over tokens, before any truncation: the mismatch to the sampler is a metric of its own.

    The squares of exp(l - m) are for the effective sample size (`policy.step`).
    """
    mask = tokens.mask
    difference = (tokens.current - tokens.sampler) * mask
    log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    importance = torch.exp(log_ratio) * mask
    sums = {
        "tokens": mask.sum(),
        "ratio_mean": (found.ratio * mask).sum(),
        "clip_fraction": (found.clipped.to(mask.dtype) * mask).sum(),
        "dropped_fraction": ((1 - kept) * mask).sum(),
        "importance_mean": importance.sum(),
        "importance_square": importance.square().sum(),
        "mismatch_mean": difference.abs().sum(),
        "mismatch_k3": ((torch.exp(log_ratio) - log_ratio - 1) * mask).sum(),
        "advantage_abs_mean": (tokens.advantages.abs() * mask).sum(),
        "log_prob_mean": (tokens.current * mask).sum(),
    }
    if entropy is not None:
        sums["entropy"] = torch.where(mask > 0, entropy, torch.zeros_like(entropy)).sum()
    largest = difference.abs().max() if difference.numel() else mask.sum()
    return sums, {"mismatch_max": largest}


class PolicyGradient(ABC):
    """An `Algorithm` that is a surrogate over this core; the neighbours each say which one."""

    needs_entropy = True  # a metric, and with `entropy_beta` a part of the loss

    def __init__(self, config: RlConfig) -> None:
        self.config = config
        self.temperature = config.temperature
        self.needs_reference = config.needs_reference

    @abstractmethod
    def surrogate(self, tokens: Tokens) -> Surrogate:
        """What is maximised, token by token."""

    @property
    def token_level(self) -> bool:
        """See `algorithms.chunked_head.TokenLoss`: nothing of it looks at a whole answer."""
        config = self.config
        masks = config.correction.kind == "sequence_mask" or config.off_policy_mask is not None
        return not masks and config.loss_aggregation != "sequence_mean" and config.entropy_beta == 0

    def token_gradient(self, batch: TokenBatch, rows: slice, log_probs: Tensor) -> Tensor:
        """See `algorithms.chunked_head.TokenLoss`."""
        with torch.enable_grad():
            own = log_probs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(rows_of(batch, rows), own, None).loss, own)
        return gradient

    def loss(self, batch: TokenBatch, log_probs: Tensor, entropy: Tensor | None) -> LossOutput:
        return policy_loss(batch, log_probs, self.config, self.surrogate, entropy=entropy)
