"""Advantages of rewards less a KL penalty, against sums written out; on one rank and on two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc_rl.algorithms.advantages import step_advantages
from hpc_rl.algorithms.config import RlConfig
from hpc_rl.policy.batching import pack_samples
from hpc_rl.policy.penalised_rewards import advantages_of
from hpc_rl.policy.step import Ranks
from hpc_rl.recipe.extensions import registry
from hpc_rl.types import TrainSample
from tests.ranks import run_ranks

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
CPU = torch.device("cpu")
GROUP, PROMPTS, BETA = 3, 4, 0.05


def config_of(name: str, beta: float) -> RlConfig:
    found: RlConfig = registry("algorithms").config(name, {"kl_beta": beta, "kl_in": "reward"})
    return found


def make_samples() -> list[TrainSample]:
    """Answers of 1 to 6 tokens with rewards where the controller puts advantages; one token in the middle of
    each longer one is not the policy's, and one answer has nothing left to train on."""
    dice = np.random.default_rng(0)
    found = []
    for number in range(GROUP * PROMPTS):
        length = 1 + number % 6
        mask = [0] + [int(place != 2) for place in range(length)]
        if number == 7:
            mask = [0] * len(mask)
        reward = float(dice.normal())
        log_probs = [float(-2 + dice.normal()) * m for m in mask]
        ids = list(range(length + 1))
        advantages = [reward * m for m in mask]
        found.append(TrainSample(number // GROUP, number % GROUP, ids, mask, log_probs, advantages))
    return found


def reference_of(sample: TrainSample) -> list[float]:
    return [-2.0 - 0.1 * (sample.ordinal + place % 3) for place in range(sum(sample.loss_mask))]


def packed(samples: list[TrainSample]) -> Any:
    batch = pack_samples(samples, 1.0, CPU).tokens
    reference = [value for sample in samples for value in reference_of(sample)]
    batch.reference_log_probs = torch.tensor(reference or [0.0])
    return batch


def ours(samples: list[TrainSample], config: RlConfig, rank: int = 0, world_size: int = 1) -> list[float]:
    """By token, of `samples` in three micro-batches, the last of which is empty."""
    micro_batches = [samples[::2], samples[1::2], []]
    ranks = Ranks(rank, world_size, world_size, 1, CPU)
    found = advantages_of([(part, packed(part)) for part in micro_batches], config, ranks)
    by_sample: dict[tuple[int, int], list[float]] = {}
    for part, values in zip(micro_batches, found, strict=True):
        flat = iter(values.tolist())
        for sample in part:
            by_sample[sample.ordinal, sample.sample] = [next(flat) for _ in range(sum(sample.loss_mask))]
    return [value for sample in samples for value in by_sample[sample.ordinal, sample.sample]]


def written(samples: list[TrainSample], config: RlConfig) -> list[float]:
    """The docstring of penalised_rewards.py, answer by answer in Python."""
    beta = config.kl_beta
    k, rewards = {}, {}
    for number, sample in enumerate(samples):
        kept = [t for t, m in enumerate(sample.loss_mask) if m]
        if kept:
            k[number] = [sample.log_probs[t] - r for t, r in zip(kept, reference_of(sample), strict=True)]
            rewards[number] = sample.advantages[kept[0]]
    groups = [[n for n in k if samples[n].ordinal == g] for g in range(PROMPTS)]
    if not config.kl_to_go:
        penalised = [np.array([rewards[n] - beta * sum(k[n]) for n in group]) for group in groups]
        values = [v for part in step_advantages(config.advantage, penalised) for v in part]
        return [float(value) for n, value in zip(k, values, strict=True) for _ in k[n]]
    if config.advantage == "group_mean_batch_std":
        means = {n: math.fsum(rewards[n] for n in group) / len(group) for group in groups for n in group}
        rewards = {n: rewards[n] - means[n] for n in k}
    returns = {n: [rewards[n] - beta * sum(k[n][t:]) for t in range(len(k[n]))] for n in k}
    mean = sum(sum(g) / len(g) for g in returns.values()) / len(k)
    spread = sum(sum((x - mean) ** 2 for x in g) / len(g) for g in returns.values()) / (len(k) - 1)
    return [(x - mean) / (math.sqrt(spread) + 1e-6) for g in returns.values() for x in g]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_it_is_what_is_written(name: str) -> None:
    samples, config = make_samples(), config_of(name, BETA)
    torch.testing.assert_close(ours(samples, config), written(samples, config), rtol=1e-5, atol=1e-6)
    later = sum(len(set(ours([s], config))) > 1 for s in samples)
    assert not later, "one answer has nothing to be compared with"


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
def test_without_a_penalty_they_are_the_controllers(name: str) -> None:
    samples, config = make_samples(), config_of(name, 1e-12)
    scored = [s for s in samples if any(s.loss_mask)]
    rewards = [[max(s.advantages, key=abs) for s in scored if s.ordinal == g] for g in range(PROMPTS)]
    values = [v for part in step_advantages(config.advantage, rewards) for v in part]
    expected = [float(v) for s, v in zip(scored, values, strict=True) for _ in range(sum(s.loss_mask))]
    torch.testing.assert_close(ours(samples, config), expected, rtol=1e-5, atol=1e-6)


def _half(rank: int, world_size: int) -> None:
    """Every prompt's answers are on both ranks."""
    samples = make_samples()
    for name in ("grpo", "reinforce_pp_baseline"):
        config = config_of(name, BETA)
        everything = dict(zip(_keys(samples), written(samples, config), strict=True))
        mine = samples[rank::2]
        found = dict(zip(_keys(mine), ours(mine, config, rank, world_size), strict=True))
        for key, value in found.items():
            assert abs(value - everything[key]) < 1e-5, (name, key)


def _keys(samples: list[TrainSample]) -> list[tuple[int, int, int]]:
    return [(s.ordinal, s.sample, t) for s in samples for t in range(sum(s.loss_mask))]


def test_prompt_groups_may_lie_on_several_ranks(tmp_path: Path) -> None:
    run_ranks(_half, 2, tmp_path)
