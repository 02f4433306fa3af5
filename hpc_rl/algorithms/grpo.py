"""The GRPO policy loss (Shao et al. 2024, arXiv:2402.03300) with off-policy correction. Minimised.

With l = trainer log-prob, m = log-prob recorded by the sampler, p = proximal log-prob, A = advantage:

    proximal: sampler (default)   r = exp(l - m),  token loss = -clipped(r)
    proximal: recompute           r = exp(l - p),  w = sg(min(exp(p - m), cap)),  token loss = -w * clipped(r)
    clipped(r) = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),   but at least dual_clip * A where A < 0

`sampler` clips against the policy that really made the token: the ratio both corrects for staleness and
for the sampler's numerics, and bounds the step; a further weight exp(p - m) would count the same
correction twice. `recompute` is decoupled PPO (Hilton et al. 2021, arXiv:2110.00641) with truncated
importance sampling: p is the trainer's own log-prob at the start of the step. In the step's first update
p = sg(l), so r = 1, the clip is idle, and the loss is -w A l: REINFORCE with a truncated weight.
`interpolate` is the same with an estimate of p (`algorithms.core.interpolation`). `correction: none` (not
with `sampler`) sets w = 1 and ignores the sampler's log-probs.

Tokens whose sampler log-prob is not finite leave the mask and the denominator (whoever counts the
denominator does the same: `algorithms.base.loss_denominator`, and the controller for a run).
"""

from __future__ import annotations

from torch import Tensor

from hpc_rl.algorithms.base import LossOutput, TokenBatch
from hpc_rl.algorithms.config import Clip
from hpc_rl.algorithms.core import PolicyGradient, Surrogate, Tokens, clipped, token_ratio


class Grpo(PolicyGradient):
    """`Algorithm` of that name, and of all that differ from it in their config alone."""

    config: Clip

    def __init__(self, config: Clip) -> None:
        super().__init__(config)

    def surrogate(self, tokens: Tokens) -> Surrogate:
        options = self.config
        return clipped(tokens, token_ratio(tokens), options.clip_low, options.clip_high, options.floor)


def grpo_loss(
    batch: TokenBatch, log_probs: Tensor, config: Clip, *, entropy: Tensor | None = None
) -> LossOutput:
    """The loss of `Grpo(config)`."""
    return Grpo(config).loss(batch, log_probs, entropy)
