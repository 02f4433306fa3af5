"""Advantages of rewards less a KL penalty (`algorithm.kl_in: reward`).

The controller, which makes advantages otherwise, has no reference model; so it sends the rewards R, and the
policy makes the advantages with the same estimators (`algorithms.advantages`), over the answers of all
ranks. With k_t the estimate for token t from the sampler's log-probs (the tokens are its samples: no
forward is needed) and beta = `kl_beta`:

- the answer's reward is R - beta * sum over its tokens of k_t, and the estimator does the rest;
- with `kl_to_go` (REINFORCE++, arXiv:2501.03262) token t has the return G_t = R - beta * sum of k_s for s
  >= t, and its advantage is (G_t - mean) / std over the step; of the group's mean of R first, in the
  -baseline variant. Mean and deviation count each answer once, as without a penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hpc_rl.algorithms.advantages import FloatArray, group_advantages, step_advantages
from hpc_rl.algorithms.base import TokenBatch
from hpc_rl.algorithms.config import RlConfig
from hpc_rl.algorithms.core import reference_penalty
from hpc_rl.policy.step import Ranks
from hpc_rl.types import TrainSample

MicroBatch = tuple[list[TrainSample], TokenBatch]
EPS = 1e-6  # as in algorithms.advantages


@dataclass(frozen=True)
class _Answer:
    """One answer: its reward, the sum of its k_t, and the means over its tokens of the sums that are to come
    from each token on, and of their squares."""

    ordinal: int
    sample: int
    reward: float
    total: float
    to_go: float
    to_go_square: float


def advantages_of(micro_batches: Sequence[MicroBatch], config: RlConfig, ranks: Ranks) -> list[Tensor]:
    """Of the tokens [N] of each micro-batch of this rank, on its device, fp32. Collective."""
    penalties = [_penalties(tokens, config) for _, tokens in micro_batches]
    own = [
        answer
        for (samples, tokens), penalty in zip(micro_batches, penalties, strict=True)
        for answer in _answers(samples, tokens, penalty)
    ]
    answers = _everyones(own, ranks)
    base, scale = _to_go(answers, config) if config.kl_to_go else _whole(answers, config)
    found = []
    for (samples, tokens), penalty in zip(micro_batches, penalties, strict=True):
        sequence = tokens.sequence.cpu().numpy()
        of_sample = np.array([base.get((s.ordinal, s.sample), 0.0) for s in samples] or [0.0])
        values = of_sample[sequence] - scale * _sums_to_come(penalty, sequence)
        kept = np.where(tokens.mask.cpu().numpy() > 0, values, 0.0)
        found.append(torch.as_tensor(kept, dtype=torch.float32).to(tokens.mask.device))
    return found


def _penalties(tokens: TokenBatch, config: RlConfig) -> FloatArray:
    """k_t [N], 0 where the mask is 0."""
    assert tokens.sampler_log_probs is not None
    found = reference_penalty(tokens, tokens.sampler_log_probs, tokens.mask, config)
    return found.double().cpu().numpy()


def _sums_to_come(penalty: FloatArray, sequence: np.ndarray) -> FloatArray:
    """The sum of k_s over s >= t of the token's sequence [N]; tokens of a sequence are neighbours."""
    found = np.empty_like(penalty)
    for number in np.unique(sequence):
        own = sequence == number
        found[own] = np.cumsum(penalty[own][::-1])[::-1]
    return found


def _answers(samples: list[TrainSample], tokens: TokenBatch, penalty: FloatArray) -> list[_Answer]:
    """Those with a trained token, of samples that are no filling."""
    sequence, mask = tokens.sequence.cpu().numpy(), tokens.mask.cpu().numpy() > 0
    assert tokens.advantages is not None
    rewards, to_come = tokens.advantages.double().cpu().numpy(), _sums_to_come(penalty, sequence)
    found = []
    for number, sample in enumerate(samples):
        own = (sequence == number) & mask
        if sample.ordinal < 0 or not own.any():
            continue
        rest = to_come[own]
        sums = (float(penalty[own].sum()), float(rest.mean()), float((rest**2).mean()))
        found.append(_Answer(sample.ordinal, sample.sample, float(rewards[own][0]), *sums))
    return found


def _everyones(own: list[_Answer], ranks: Ranks) -> list[_Answer]:
    """Those of all ranks, each once, in the order of prompts."""
    rows = torch.tensor([[*vars(answer).values()] for answer in own], dtype=torch.float64).view(-1, 6)
    if ranks.world_size > 1:
        count = torch.tensor([len(own)], device=ranks.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        padded = torch.full((int(count), 6), -1.0, dtype=torch.float64, device=ranks.device)
        padded[: len(own)] = rows.to(ranks.device)
        parts = [torch.empty_like(padded) for _ in range(ranks.world_size)]
        dist.all_gather(parts, padded)
        rows = torch.cat(parts).cpu()
    # Ranks of one tensor-parallel group have the same answers; theirs are equal, but for rounding.
    by_key = {(int(row[0]), int(row[1])): row for row in reversed(rows.tolist()) if row[0] >= 0}
    return [_Answer(*key, *row[2:]) for key, row in sorted(by_key.items())]


Keyed = dict[tuple[int, int], float]


def _groups(answers: list[_Answer]) -> list[list[_Answer]]:
    by_prompt: dict[int, list[_Answer]] = {}
    for answer in answers:
        by_prompt.setdefault(answer.ordinal, []).append(answer)
    return list(by_prompt.values())


def _keyed(groups: list[list[_Answer]], values: Sequence[FloatArray]) -> Keyed:
    flat = zip((a for group in groups for a in group), (v for part in values for v in part), strict=True)
    return {(answer.ordinal, answer.sample): float(value) for answer, value in flat}


def _whole(answers: list[_Answer], config: RlConfig) -> tuple[Keyed, float]:
    """`(advantage of each answer, 0)`: the penalty is in it."""
    groups = _groups(answers)
    rewards = [np.array([a.reward - config.kl_beta * a.total for a in group]) for group in groups]
    return _keyed(groups, step_advantages(config.advantage, rewards)), 0.0


def _to_go(answers: list[_Answer], config: RlConfig) -> tuple[Keyed, float]:
    """`(what each answer's tokens have alike, what the sums to come are multiplied with and taken off)`."""
    groups, beta = _groups(answers), config.kl_beta
    rewards = [np.array([a.reward for a in group]) for group in groups]
    if config.advantage == "group_mean_batch_std":
        rewards = [group_advantages(group, normalize_std=False) for group in rewards]
    base = np.concatenate(rewards) if rewards else np.zeros(0)
    first = np.array([a.to_go for group in groups for a in group])
    second = np.array([a.to_go_square for group in groups for a in group])
    means = base - beta * first
    mean = means.mean() if len(means) else 0.0
    squares = base**2 - 2 * base * beta * first + beta**2 * second
    variance = (squares - 2 * mean * means + mean**2).clip(min=0.0).sum() / max(len(base) - 1, 1)
    deviation = float(np.sqrt(variance))
    if len(base) < 2 or deviation <= EPS * float(np.abs(base).max(initial=0.0)):
        return _keyed(groups, [np.zeros_like(group) for group in rewards]), 0.0
    scale = 1 / (deviation + EPS)
    return _keyed(groups, [(group - mean) * scale for group in rewards]), beta * scale
