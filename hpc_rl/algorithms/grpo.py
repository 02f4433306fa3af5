"""The GRPO policy loss (Shao et al. 2024, arXiv:2402.03300) with off-policy correction. Minimised.

With l = trainer log-prob, m = log-prob recorded by the sampler, p = proximal log-prob, A = advantage:

    proximal: sampler (default)   r = exp(l - m),  token loss = -clipped(r)
    proximal: recompute           r = exp(l - p),  w = sg(min(exp(p - m), cap)),  token loss = -w * clipped(r)
    clipped(r) = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),   but at least cap * A where A < 0

`sampler` clips against the policy that really made the token: the ratio both corrects for staleness and
for the sampler's numerics, and bounds the step; a further weight exp(p - m) would count the same
correction twice. `recompute` is decoupled PPO (Hilton et al. 2021, arXiv:2110.00641) with truncated
importance sampling: p is the trainer's own log-prob at the start of the step. With one optimizer step
per batch p = sg(l), so r = 1, the clip is idle, and the loss is -w A l: REINFORCE with a truncated
weight. The floor cap * A is dual clip (Ye et al. 2019, arXiv:1912.09729). `correction: none` (only with
`recompute`) sets w = 1 and ignores the sampler's log-probs.

Tokens whose sampler log-prob is not finite leave the mask and the denominator (whoever counts the
denominator does the same: `algorithms.base.loss_denominator`, and the controller for a run). Left out
on purpose: the reference KL, which needs a reference model in the policy room.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_rl.algorithms.base import LossOutput, TokenBatch, drop_unusable, token_weights
from hpc_rl.algorithms.config import GrpoConfig

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far outside any clip, and still finite in fp32


class Grpo:
    """`Algorithm` of that name. Raises ValueError for options that no issue has built yet."""

    needs_entropy = True

    def __init__(self, config: GrpoConfig) -> None:
        if config.kl_beta > 0:
            raise ValueError(
                "algorithm.kl_beta > 0 needs a reference model, which this version does not load; set it to 0"
            )
        self.config = config
        self.temperature = config.temperature

    def loss(self, batch: TokenBatch, log_probs: Tensor, entropy: Tensor | None) -> LossOutput:
        return grpo_loss(batch, log_probs, self.config, entropy=entropy)


def grpo_loss(
    batch: TokenBatch,
    log_probs: Tensor,
    config: GrpoConfig,
    *,
    proximal_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
) -> LossOutput:
    """This micro-batch's share of the loss above, for trainer log-probs [N] with graph.

    `proximal_log_probs` [N] are those at the start of the step for `proximal: recompute`; without
    them `log_probs` themselves, detached (right for one optimizer step per batch).
    """
    assert batch.sampler_log_probs is not None
    assert batch.advantages is not None
    mask = drop_unusable(batch.mask, batch.sampler_log_probs)
    kept = mask > 0
    zero = torch.zeros_like(log_probs)
    # Masked values may be -inf or NaN; `where` on the inputs keeps them out of the gradient too.
    current = torch.where(kept, log_probs, zero)
    sampler = torch.where(kept, batch.sampler_log_probs, zero)
    advantages = torch.where(kept, batch.advantages, zero)
    weights = token_weights(mask, batch, config.loss_aggregation)

    if config.proximal == "sampler":
        proximal, importance = sampler, torch.ones_like(sampler)
    else:
        proximal = (
            current.detach() if proximal_log_probs is None else torch.where(kept, proximal_log_probs, zero)
        )
        importance = torch.ones_like(sampler)
        if config.correction.kind == "tis":
            importance = _ratio(proximal - sampler).clamp(max=config.correction.cap)
    ratio = _ratio(current - proximal)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    gain = torch.where(advantages < 0, torch.maximum(gain, config.correction.cap * advantages), gain)
    loss = -(weights * importance.detach() * gain).sum()
    # An all-masked micro-batch still has a graph: the other ranks wait for its backward.
    loss = loss + current.sum() * 0.0
    return LossOutput(loss, *_statistics(current, sampler, advantages, ratio, mask, config, entropy))


def _ratio(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


@torch.no_grad()
def _statistics(
    current: Tensor,
    sampler: Tensor,
    advantages: Tensor,
    ratio: Tensor,
    mask: Tensor,
    config: GrpoConfig,
    entropy: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Totals over tokens, before any truncation: the mismatch to the sampler is a metric of its own."""
    difference = (current - sampler) * mask
    log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    too_high = (advantages > 0) & (ratio > 1 + config.clip_high)
    too_low = (advantages < 0) & (ratio < 1 - config.clip_low)
    sums = {
        "tokens": mask.sum(),
        "ratio_mean": (ratio * mask).sum(),
        "clip_fraction": ((too_high | too_low).to(mask.dtype) * mask).sum(),
        "mismatch_mean": difference.abs().sum(),
        "mismatch_k3": ((torch.exp(log_ratio) - log_ratio - 1) * mask).sum(),
        "advantage_abs_mean": (advantages.abs() * mask).sum(),
        "log_prob_mean": (current * mask).sum(),
    }
    if entropy is not None:
        sums["entropy"] = (torch.where(mask > 0, entropy, torch.zeros_like(entropy))).sum()
    largest = difference.abs().max() if difference.numel() else mask.sum()
    return sums, {"mismatch_max": largest}
