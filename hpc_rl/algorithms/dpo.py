"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): no rollouts, no reward model.

With s(y) = sum over the answer's tokens of l - l_ref (`reference: false`: of l alone; `length_normalize`: the
mean), h = s(chosen) - s(rejected) and P pairs in the optimizer step, the loss, to be minimised, is

    1 / P * sum over pairs of ( f(h) - nll_weight * mean over the chosen tokens of l )

    sigmoid   f = -(1 - e) log sigma(beta h - gamma) - e log sigma(-(beta h - gamma))      e: label_smoothing
    hinge     f = max(0, 1 - beta h)                             (SLiC, Zhao et al. 2023, arXiv:2305.10425)
    ipo       f = (h - 1 / (2 beta))^2, of means                       (Azar et al. 2023, arXiv:2310.12036)

e > 0 is cDPO (Mitchell 2023); without reference, with means and gamma it is SimPO (Meng et al. 2024,
arXiv:2405.14734, whose gamma is taken off beta h as here); nll_weight is that of Pang et al. 2024
(arXiv:2404.19733). IPO takes means as its authors say they did. A pair counts if both sides have a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_rl.algorithms.base import LossOutput, TokenBatch
from hpc_rl.algorithms.config import DpoConfig
from hpc_rl.algorithms.core import kl_penalty


@dataclass(frozen=True)
class Pairs:
    """Sums over the sides of P pairs, all [P, 2]: chosen, rejected. `counts` are their tokens."""

    current: Tensor
    reference: Tensor
    counts: Tensor

    @property
    def mask(self) -> Tensor:
        """1 for pairs that count [P]."""
        return (self.counts > 0).all(dim=1).to(self.current.dtype)

    @classmethod
    def of(cls, batch: TokenBatch, log_probs: Tensor, *, reference: bool) -> Pairs:
        """Of log-probs [N] with graph; sequence 2 i is the chosen one of pair i, 2 i + 1 the rejected one."""
        kept = batch.mask > 0
        count = (batch.num_sequences + 1) // 2  # a micro-batch without pairs still has one sequence

        def per_side(values: Tensor) -> Tensor:
            values = torch.where(kept, values, torch.zeros_like(values))
            return values.new_zeros(2 * count).index_add(0, batch.sequence, values).view(count, 2)

        current = per_side(log_probs)
        held = torch.zeros_like(current)
        if reference:
            assert batch.reference_log_probs is not None
            held = per_side(batch.reference_log_probs.to(log_probs.dtype))
        return cls(current, held.detach(), per_side(torch.ones_like(log_probs)))


def pair_loss(scores: Tensor, config: DpoConfig) -> Tensor:
    """f(h) of each pair [P] for scores s [P, 2]."""
    h = scores[:, 0] - scores[:, 1]
    if config.loss == "ipo":
        return (h - 1 / (2 * config.beta)).square()
    if config.loss == "hinge":
        return torch.relu(1 - config.beta * h)
    margin, smoothing = config.beta * h - config.gamma, config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


class Dpo:
    """`Algorithm` of that name. The step's denominator counts pairs."""

    needs_entropy = False
    temperature = 1.0

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        self.needs_reference = config.needs_reference

    def loss(self, batch: TokenBatch, log_probs: Tensor, entropy: Tensor | None = None) -> LossOutput:
        config = self.config
        pairs = Pairs.of(batch, log_probs, reference=config.reference)
        lengths = pairs.counts.clamp(min=1.0)
        means = config.length_normalize or config.loss == "ipo"
        scores = (pairs.current - pairs.reference) / (lengths if means else 1.0)
        weights = pairs.mask / (batch.denominator or 1.0)
        loss = (weights * pair_loss(scores, config)).sum()
        if config.nll_weight > 0:
            loss = loss - config.nll_weight * (weights * pairs.current[:, 0] / lengths[:, 0]).sum()
        # A micro-batch without a pair still has a graph: the other ranks wait for its backward.
        loss = loss + pairs.current.sum() * 0.0
        sums, means = _statistics(batch, pairs, scores.detach(), weights, log_probs.detach(), config)
        return LossOutput(loss, sums, {}, means)


@torch.no_grad()
def _statistics(
    batch: TokenBatch, pairs: Pairs, scores: Tensor, weights: Tensor, log_probs: Tensor, config: DpoConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`(totals over tokens, means over pairs)`.

    `rewards_*` are beta s, DPO's implicit rewards, and `margin` their difference; a tie is no success.
    `kl_reference` is k3 of the trained tokens (`core.kl_penalty`): they are the data's, not the policy's, so
    it says how far the policy has moved, and not what its KL is.
    """
    rewards = config.beta * scores
    margins = rewards[:, 0] - rewards[:, 1]
    sums = {"tokens": batch.mask.sum(), "log_prob_mean": pairs.current.sum()}
    if config.reference:
        assert batch.reference_log_probs is not None
        kl = kl_penalty("k3", log_probs, batch.reference_log_probs.to(log_probs.dtype))
        sums["kl_reference"] = torch.where(batch.mask > 0, kl, torch.zeros_like(kl)).sum()
    shares = {
        "accuracy": (margins > 0).to(weights.dtype),
        "margin": margins,
        "rewards_chosen": rewards[:, 0],
        "rewards_rejected": rewards[:, 1],
        "log_prob_chosen": pairs.current[:, 0],
        "log_prob_rejected": pairs.current[:, 1],
    }
    means = {name: (weights * value).sum() for name, value in shares.items()}
    return sums, means
