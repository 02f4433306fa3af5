"""On-policy distillation: the policy samples, the teacher says token by token how likely it finds that.

    A_t = A + teacher_coef * (t - sg(l))          t: the teacher's log-prob of the token
    loss = -sum over tokens of sg(min(r, is_cap)) A_t l * weight                       (`core.truncated`)

Without rewards A = 0. On the policy's own samples the mean of l - t is the reverse KL to the teacher, and the
gradient of this loss is that of each token's KL in the context it has (Agarwal et al. 2024, arXiv:2306.13649;
Thinking Machines 2025, "On-Policy Distillation"): a token is not charged for what it leads to. The log-prob
in A_t is the present policy's, and r corrects for the weights that sampled the token, so staleness biases
neither factor. With rewards, A is the group's advantage. t - l is bounded by `core.MAX_LOG_RATIO`; a token
whose t is not finite leaves the mask and the denominator.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hpc_rl.algorithms.base import LossOutput, TokenBatch, drop_unusable
from hpc_rl.algorithms.config import DistillConfig
from hpc_rl.algorithms.core import (
    MAX_LOG_RATIO,
    PolicyGradient,
    Surrogate,
    Tokens,
    policy_loss,
    token_ratio,
    truncated,
)


class Distill(PolicyGradient):
    """`Algorithm` of that name: CISPO's surrogate with the teacher's opinion in the advantages."""

    config: DistillConfig

    def surrogate(self, tokens: Tokens) -> Surrogate:
        return truncated(tokens, token_ratio(tokens), self.config.is_cap)

    def loss(self, batch: TokenBatch, log_probs: Tensor, entropy: Tensor | None) -> LossOutput:
        assert batch.teacher_log_probs is not None
        assert batch.advantages is not None
        mask = drop_unusable(batch.mask, batch.sampler_log_probs, batch.teacher_log_probs)
        apart = torch.where(mask > 0, batch.teacher_log_probs - log_probs.detach(), torch.zeros_like(mask))
        bounded = apart.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        advantages = batch.advantages + self.config.teacher_coef * bounded
        taught = replace(batch, mask=mask, advantages=advantages)
        output = policy_loss(taught, log_probs, self.config, self.surrogate, entropy=entropy)
        output.sums["kl_teacher"] = -apart.sum()
        return output
