"""The losses as their papers write them, token by token in plain Python: nothing here calls the library.

l, m: log-probs of trainer and sampler; A: advantage; `sg` is `.detach()`. Each returns the loss of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hpc_rl.algorithms.base import TokenBatch

LENGTH = 20  # what Dr. GRPO divides by


def answers(batch: TokenBatch) -> Iterator[list[int]]:
    """The trained tokens of each sequence that has any."""
    assert batch.sampler_log_probs is not None
    usable = [
        bool(k) and bool(torch.isfinite(m)) for k, m in zip(batch.mask, batch.sampler_log_probs, strict=True)
    ]
    for s in range(batch.num_sequences):
        tokens = [t for t in range(len(usable)) if int(batch.sequence[t]) == s and usable[t]]
        if tokens:
            yield tokens


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def ppo(ratio: Tensor, a: Tensor, low: float, high: float, floor: float = 2.0) -> Tensor:
    """min(r A, clip(r) A); for A < 0 not below floor * A."""
    bounded = ratio.clamp(1 - low, 1 + high)
    gain = torch.min(ratio * a, bounded * a)
    return torch.max(gain, floor * a) if a < 0 else gain


def per_token(batch: TokenBatch, lp: Tensor, loss: Callable[[int], Tensor]) -> tuple[list[list[Tensor]], int]:
    """The loss of every token, by answer, and the number of tokens."""
    found = [[loss(t) for t in tokens] for tokens in answers(batch)]
    return found, sum(len(one) for one in found)


def token_mean(batch: TokenBatch, lp: Tensor, loss: Callable[[int], Tensor]) -> Tensor:
    found, tokens = per_token(batch, lp, loss)
    return torch.stack([x for one in found for x in one]).sum() / tokens


def clipped(low: float = 0.2, high: float = 0.2) -> Callable[[TokenBatch, Tensor], Tensor]:
    """arXiv:2402.03300 with a mean over tokens (arXiv:2503.14476), without the KL."""

    def loss(batch: TokenBatch, lp: Tensor) -> Tensor:
        m, a = batch.sampler_log_probs, batch.advantages
        return token_mean(batch, lp, lambda t: -ppo(torch.exp(lp[t] - m[t]), a[t], low, high))

    return loss


def sequence_means(batch: TokenBatch, lp: Tensor) -> Tensor:
    """The same with a mean per answer, then over answers: GRPO as first published."""
    m, a = batch.sampler_log_probs, batch.advantages
    return mean(
        [mean([-ppo(torch.exp(lp[t] - m[t]), a[t], 0.2, 0.2) for t in tokens]) for tokens in answers(batch)]
    )


def dr_grpo(batch: TokenBatch, lp: Tensor) -> Tensor:
    """arXiv:2503.20783: a sum over tokens by a constant, and a mean over answers."""
    m, a = batch.sampler_log_probs, batch.advantages
    found = [
        torch.stack([-ppo(torch.exp(lp[t] - m[t]), a[t], 0.2, 0.2) for t in tokens]).sum() / LENGTH
        for tokens in answers(batch)
    ]
    return mean(found)


def gspo(batch: TokenBatch, lp: Tensor) -> Tensor:
    """arXiv:2507.18071: one ratio per answer, differentiated as it stands."""
    m, a = batch.sampler_log_probs, batch.advantages
    found = []
    for tokens in answers(batch):
        s = torch.exp(mean([lp[t] - m[t] for t in tokens]))
        found.append(-ppo(s, a[tokens[0]], 3e-4, 4e-4))
    return mean(found)


def cispo(cap: float) -> Callable[[TokenBatch, Tensor], Tensor]:
    """arXiv:2506.13585 (no lower bound), and LlamaRL's AIPO (arXiv:2505.24034)."""

    def loss(batch: TokenBatch, lp: Tensor) -> Tensor:
        m, a = batch.sampler_log_probs, batch.advantages
        weight = lambda t: torch.exp(lp[t] - m[t]).detach().clamp(max=cap)  # noqa: E731
        return token_mean(batch, lp, lambda t: -weight(t) * a[t] * lp[t])

    return loss


def rloo(batch: TokenBatch, lp: Tensor) -> Tensor:
    """arXiv:2402.14740: the log-prob of a whole answer times its advantage; tokens are weighted."""
    m, a = batch.sampler_log_probs, batch.advantages
    found = []
    for tokens in answers(batch):
        weights = [torch.exp(lp[t] - m[t]).detach().clamp(max=2.0) for t in tokens]
        log_prob = torch.stack([w * lp[t] for w, t in zip(weights, tokens, strict=True)]).sum()
        found.append(-a[tokens[0]] * log_prob)
    return mean(found)


def decoupled(correct: Callable[[list[Tensor], int], Tensor]) -> Callable[[TokenBatch, Tensor], Tensor]:
    """arXiv:2110.00641 at the first optimizer step of a batch: the gradient of -w A l, w without gradient.

    `correct(log_ratios of the answer, position)` is w.
    """

    def loss(batch: TokenBatch, lp: Tensor) -> Tensor:
        m, a = batch.sampler_log_probs, batch.advantages
        total, count = lp.new_zeros(()), 0
        for tokens in answers(batch):
            log_ratios = [(lp[t] - m[t]).detach() for t in tokens]
            for position, t in enumerate(tokens):
                total = total - correct(log_ratios, position) * a[t] * torch.exp(lp[t] - lp[t].detach())
                count += 1
        return total / count

    return loss


def tis(log_ratios: list[Tensor], position: int) -> Tensor:
    return torch.exp(log_ratios[position]).clamp(max=2.0)


def icepop(log_ratios: list[Tensor], position: int) -> Tensor:
    """arXiv:2510.18855: the ratio inside [0.7, 1.4], else nothing."""
    rho = torch.exp(log_ratios[position])
    return rho if 0.7 <= float(rho) <= 1.4 else torch.zeros_like(rho)


def sequence_mask(log_ratios: list[Tensor], position: int) -> Tensor:
    """Answers whose geometric mean of ratios lies in [0.9, 1.1], with truncated token weights."""
    geometric = float(torch.exp(mean(log_ratios)))
    return tis(log_ratios, position) if 0.9 <= geometric <= 1.1 else torch.zeros(()).double()


def off_policy_masked(batch: TokenBatch, lp: Tensor) -> Tensor:
    """DeepSeek-V3.2 (arXiv:2512.02556): answers with A < 0 and mean(m - l) > delta = 0.05 teach nothing."""
    m, a = batch.sampler_log_probs, batch.advantages
    total, count = lp.new_zeros(()), 0
    for tokens in answers(batch):
        behind = float(mean([m[t] - lp[t].detach() for t in tokens])) > 0.05
        for t in tokens:
            count += 1
            if not (behind and a[t] < 0):
                total = total - ppo(torch.exp(lp[t] - m[t]), a[t], 0.2, 0.2)
    return total / count


def with_positive_nll(batch: TokenBatch, lp: Tensor) -> Tensor:
    """VAPO (arXiv:2504.05118): imitation of good answers, here over all tokens of the step."""
    a = batch.advantages
    imitate = token_mean(batch, lp, lambda t: -lp[t] * float(a[t] > 0))
    return clipped()(batch, lp) + 0.1 * imitate


def interpolated(batch: TokenBatch, lp: Tensor) -> Tensor:
    """Decoupled PPO with AReaL's proximal log-prob (arXiv:2505.24298), cap 2."""
    m, a, v = batch.sampler_log_probs, batch.advantages, batch.versions

    def loss(t: int) -> Tensor:
        began, now = batch.start_version, batch.start_version + batch.progress
        alpha = (began - float(v[t])) / (now - float(v[t]))
        p = m[t] + alpha * (lp[t].detach() - m[t])
        weight = torch.exp(p - m[t]).clamp(max=2.0)
        return -weight * ppo(torch.exp(lp[t] - p), a[t], 0.2, 0.2)

    return token_mean(batch, lp, loss)


def held(penalty: Callable[[Tensor], Tensor], beta: float) -> Callable[[TokenBatch, Tensor], Tensor]:
    """GRPO with its KL (arXiv:2402.03300): `penalty` of d = reference - l, a mean over tokens."""

    def loss(batch: TokenBatch, lp: Tensor) -> Tensor:
        ref = batch.reference_log_probs
        return clipped()(batch, lp) + beta * token_mean(batch, lp, lambda t: penalty(ref[t] - lp[t]))

    return loss


def k2(d: Tensor) -> Tensor:
    return d * d / 2


def k3(d: Tensor) -> Tensor:
    """Schulman 2020, Approximating KL divergence."""
    return torch.exp(d) - 1 - d


def k3_k2(d: Tensor) -> Tensor:
    """The value of k3; the derivative of d^2 / 2 is d."""
    return k3(d).detach() + (d - d.detach()) * d.detach()


BETA = 0.02
RECOMPUTE = {"proximal": "recompute"}
# case -> (algorithm, its options, the written loss)
CASES: dict[str, tuple[str, dict[str, Any], Callable[[TokenBatch, Tensor], Tensor]]] = {
    "grpo": ("grpo", {}, clipped()),
    "grpo, sequence_mean": ("grpo", {"loss_aggregation": "sequence_mean"}, sequence_means),
    "dr_grpo": ("dr_grpo", {"loss_length": LENGTH}, dr_grpo),
    "dapo": ("dapo", {}, clipped(high=0.28)),
    "gspo": ("gspo", {}, gspo),
    "cispo": ("cispo", {}, cispo(5.0)),
    "aipo": ("aipo", {}, cispo(2.0)),
    "rloo": ("rloo", {}, rloo),
    "reinforce_pp": ("reinforce_pp", {}, clipped()),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", {}, clipped()),
    "maxrl": ("maxrl", {}, clipped()),
    "grpo, tis": ("grpo", RECOMPUTE, decoupled(tis)),
    "grpo, icepop": (
        "grpo",
        {**RECOMPUTE, "correction": {"kind": "icepop", "low": 0.7, "high": 1.4}},
        decoupled(icepop),
    ),
    "grpo, sequence mask": (
        "grpo",
        {**RECOMPUTE, "correction": {"kind": "sequence_mask", "low": 0.9, "high": 1.1}},
        decoupled(sequence_mask),
    ),
    "grpo, off-policy mask": ("grpo", {"off_policy_mask": 0.05}, off_policy_masked),
    "grpo, interpolate": ("grpo", {"proximal": "interpolate"}, interpolated),
    "grpo, KL": ("grpo", {"kl_beta": BETA}, held(k3_k2, BETA)),
    "grpo, KL k2": ("grpo", {"kl_beta": BETA, "kl_estimator": "k2"}, held(k2, BETA)),
    "grpo, KL k3": ("grpo", {"kl_beta": BETA, "kl_estimator": "k3"}, held(k3, BETA)),
    "grpo, positive NLL": ("grpo", {"positive_nll": 0.1}, with_positive_nll),
}
