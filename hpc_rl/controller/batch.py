"""From scored prompt groups to one `TrainStep` per policy rank.

Everything that must be counted over all ranks and micro-batches is counted here, once, after every
mask: the policy only divides. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hpc_rl.algorithms.advantages import group_advantages, has_signal
from hpc_rl.bus.messages import MicroBatch, TrainStep
from hpc_rl.data.packing import pack, pack_fixed
from hpc_rl.types import PromptGroup, TrainSample, Trajectory


@dataclass(frozen=True)
class BatchOptions:
    """What of the recipe decides how a step is packed."""

    data_parallel: int
    ranks_per_replica: int  # tp * pp * cp: ranks that see the same samples
    micro_batch_tokens: int | None
    micro_batch_size: int | None
    normalize_std: bool
    aggregation: str  # token_mean | sequence_mean


def to_sample(trajectory: Trajectory, advantage: float) -> TrainSample:
    """Prompt + answer as one sequence. Tokens with a non-finite sampler log-prob leave the mask, and so do
    all tokens of an answer that could not be scored (reward NaN)."""
    before = len(trajectory.prompt_ids)
    mask = trajectory.loss_mask or [1] * len(trajectory.token_ids)
    scored = not math.isnan(trajectory.reward)
    mask = [int(m and scored and math.isfinite(lp)) for m, lp in zip(mask, trajectory.log_probs, strict=True)]
    log_probs = [lp if m else 0.0 for m, lp in zip(mask, trajectory.log_probs, strict=True)]
    return TrainSample(
        ordinal=trajectory.ordinal,
        sample=trajectory.sample,
        token_ids=trajectory.prompt_ids + trajectory.token_ids,
        loss_mask=[0] * before + mask,
        log_probs=[0.0] * before + log_probs,
        advantages=[0.0] * before + [advantage * m for m in mask],
        version=trajectory.oldest_version,
    )


def make_samples(groups: list[PromptGroup], normalize_std: bool) -> list[TrainSample]:
    """Advantages per group (they need rewards alone), then one sample per trajectory, in order."""
    samples = []
    for group in groups:
        rewards = np.array([trajectory.reward for trajectory in group.trajectories], dtype=np.float64)
        advantages = group_advantages(rewards, normalize_std=normalize_std)
        samples += [to_sample(t, float(a)) for t, a in zip(group.trajectories, advantages, strict=True)]
    return samples


def loss_denominator(samples: list[TrainSample], aggregation: str) -> float:
    """Tokens (token_mean) or non-empty sequences (sequence_mean) of the whole optimizer step."""
    tokens = [sum(sample.loss_mask) for sample in samples]
    if aggregation == "token_mean":
        return float(sum(tokens))
    if aggregation == "sequence_mean":
        return float(sum(1 for count in tokens if count))
    raise ValueError(f"unknown loss aggregation {aggregation!r}; known: token_mean, sequence_mean")


def train_steps(step: int, samples: list[TrainSample], options: BatchOptions) -> list[TrainStep]:
    """One `TrainStep` per policy rank, with equal numbers of micro-batches.

    A step without a single token to train on (all its prompts dropped, all answers empty or unscored) has
    no micro-batches and denominator 0: the policy counts it and changes nothing.
    """
    denominator = loss_denominator(samples, options.aggregation)
    if denominator == 0:
        return [TrainStep(step) for _ in range(options.data_parallel * options.ranks_per_replica)]
    lengths = [len(sample.token_ids) for sample in samples]
    if options.micro_batch_size is not None:
        plan = pack_fixed(lengths, options.micro_batch_size, options.data_parallel)
    else:
        plan = pack(lengths, options.micro_batch_tokens or max(lengths), options.data_parallel)
    commands = []
    for micro_batches in plan:
        command = TrainStep(
            step=step,
            micro_batches=[MicroBatch([samples[i] for i in indices]) for indices in micro_batches],
            denominator=denominator,
        )
        commands += [command] * options.ranks_per_replica
    return commands


@dataclass(frozen=True)
class PreparedStep:
    """A step that is packed before the policy can take it."""

    step: int
    commands: list[TrainStep]
    metrics: dict[str, float]

    @property
    def empty(self) -> bool:
        return self.commands[0].denominator == 0

    @classmethod
    def of(cls, step: int, groups: list[PromptGroup], options: BatchOptions) -> PreparedStep:
        samples = make_samples(groups, options.normalize_std)
        return cls(step, train_steps(step, samples, options), rollout_metrics(groups, step - 1))


def rollout_metrics(groups: list[PromptGroup], version: int) -> dict[str, float]:
    """What the batch says of the rollouts: rewards, lengths, staleness against `version`."""
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories:
        return {}
    rewards = np.array([t.reward for t in trajectories])  # NaN: could not be scored
    lengths = np.array([len(t.token_ids) for t in trajectories])
    stale = np.array([version - t.oldest_version for t in trajectories])
    signal = [has_signal([t.reward for t in group.trajectories]) for group in groups]
    metrics = {
        "rollout/reward_mean": float(np.nanmean(rewards)),
        "rollout/reward_std": float(np.nanstd(rewards)),
        "rollout/unscored": float(np.isnan(rewards).mean()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": float(np.mean([t.finish == "length" for t in trajectories])),
        "rollout/staleness_mean": float(stale.mean()),
        "rollout/staleness_max": float(stale.max()),
        "rollout/zero_variance_groups": 1.0 - float(np.mean(signal)),
        "rollout/tokens": float(lengths.sum()),
        "rollout/groups": float(len(groups)),
    }
    for name in sorted({name for t in trajectories for name in t.rewards}):
        scores = [t.rewards[name] for t in trajectories if name in t.rewards]
        metrics[f"reward/{name}"] = float(np.mean(scores))
    return metrics
