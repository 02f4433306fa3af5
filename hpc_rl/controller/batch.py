"""From scored prompt groups to one `TrainStep` per policy rank.

Everything that must be counted over all ranks and micro-batches is counted here, once, after every
mask: the policy only divides. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpc_rl.algorithms.advantages import (
    FloatArray,
    has_signal,
    overlong_penalty,
    step_advantages,
    turn_advantages,
)
from hpc_rl.algorithms.denominators import step_denominator
from hpc_rl.bus.messages import MicroBatch, MiniBatch, TrainStep
from hpc_rl.data.packing import pack, pack_fixed
from hpc_rl.data.prompt_rows import has_media
from hpc_rl.types import PromptGroup, TrainSample, Trajectory, VersionSpan


@dataclass(frozen=True)
class BatchOptions:
    """What of the recipe decides what a step's samples are and how they are packed."""

    data_parallel: int
    ranks_per_replica: int  # tp * pp * cp: ranks that see the same samples
    micro_batch_tokens: int | None
    micro_batch_size: int | None
    aggregation: str  # of algorithms.denominators
    advantage: str = "group_std"  # of algorithms.advantages
    rewards_alone: bool = False  # the samples carry rewards: the policy makes the advantages
    loss_length: int | None = None  # what constant_length divides each sequence by
    max_tokens: int = 0
    overlong_buffer: int = 0  # of max_tokens
    mini_batches: int = 1  # optimizer updates that a step's samples are split into
    seed: int = 0  # of that split
    pair_cost: float = 0.0  # of attention, as data.packing counts work
    credit: str = "trajectory"  # or turn: what an advantage is of
    teacher: bool = False  # the samples carry the teacher's log-probs, and tokens without one are not trained

    @classmethod
    def of(cls, algorithm: Any, *, max_tokens: int, **packing: Any) -> BatchOptions:
        """From an algorithm's config (`algorithms.config.RlConfig`, which a plugin's is derived from)."""
        buffer = algorithm.overlong_buffer
        return cls(
            aggregation=algorithm.loss_aggregation,
            advantage=algorithm.advantage,
            rewards_alone=algorithm.penalised_rewards,
            teacher=algorithm.needs_teacher,
            loss_length=algorithm.loss_length or max_tokens,
            max_tokens=max_tokens,
            overlong_buffer=max_tokens // 5 if buffer is None else buffer,
            **packing,
        )


def to_sample(
    trajectory: Trajectory, advantage: float | FloatArray, row: int = -1, *, teacher: bool = False
) -> TrainSample:
    """Prompt + answer as one sequence; `row` is that of a prompt with media. `advantage` is one number, or
    one for each turn. Tokens with a non-finite sampler log-prob leave the mask, and so do all tokens of an
    answer that could not be scored (reward NaN); with `teacher`, those that it did not score as well."""
    count, before = len(trajectory.token_ids), len(trajectory.prompt_ids)
    taught: list[float] = []
    if teacher:
        taught = trajectory.teacher_log_probs or [math.nan] * count
    mask, log_probs = trajectory.loss_mask or [1] * count, trajectory.log_probs
    advantages = _of_tokens(trajectory, advantage)
    if math.isnan(trajectory.reward):
        mask = [0] * count
    mask = _finite(_finite(mask, log_probs), taught) if teacher else _finite(mask, log_probs)
    if 0 in mask:
        log_probs = [lp if m else 0.0 for m, lp in zip(mask, log_probs, strict=True)]
        advantages = [value * m for value, m in zip(advantages, mask, strict=True)]
    return TrainSample(
        ordinal=trajectory.ordinal,
        sample=trajectory.sample,
        token_ids=trajectory.prompt_ids + trajectory.token_ids,
        loss_mask=[0] * before + mask,
        log_probs=[0.0] * before + log_probs,
        advantages=[0.0] * before + advantages,
        version=trajectory.oldest_version,
        spans=[VersionSpan(s.version, before + s.start, before + s.end) for s in trajectory.spans],
        row=row,
        teacher_log_probs=[0.0] * before + taught if teacher else [],
    )


def _of_tokens(trajectory: Trajectory, advantage: float | FloatArray) -> list[float]:
    """The advantage of each token: a turn's tokens, and the environment's before them, have the turn's."""
    if isinstance(advantage, int | float):
        return [advantage] * len(trajectory.token_ids)
    values: list[float] = []
    for end, value in zip(trajectory.turn_ends, advantage.tolist(), strict=True):
        values += [value] * (end - len(values))
    return values + [0.0] * (len(trajectory.token_ids) - len(values))


def _finite(mask: list[int], values: list[float]) -> list[int]:
    """`mask` without the tokens of which the value is not finite. A sum is finite if all its terms are, and
    costs a tenth of looking at each: a controller does this for every token of the run."""
    if len(mask) != len(values):
        raise ValueError(f"{len(values)} log-probs for {len(mask)} tokens")
    if math.isfinite(sum(values)):
        return mask
    return [int(m and math.isfinite(value)) for m, value in zip(mask, values, strict=True)]


def raw_rewards(group: PromptGroup) -> FloatArray:
    """As scored [G]; NaN where that failed."""
    return np.array([trajectory.reward for trajectory in group.trajectories], dtype=np.float64)


def shaped_rewards(group: PromptGroup, options: BatchOptions) -> FloatArray:
    """What the advantages are of [G]: the rewards, less for answers close to the limit if so asked."""
    lengths = [len(trajectory.token_ids) for trajectory in group.trajectories]
    return raw_rewards(group) + overlong_penalty(lengths, options.max_tokens, options.overlong_buffer)


def teaches(group: PromptGroup, credit: str) -> bool:
    """Whether the answers of a group were scored differently; with credit of turns, their ends or turns."""
    if credit == "trajectory":
        return has_signal(raw_rewards(group))
    turns = turn_advantages("group_mean", [_outcomes(group, raw_rewards(group))], [_turn_rewards(group)])
    return any(values.any() for values in turns[0])


def _turn_rewards(group: PromptGroup) -> list[list[float]]:
    return [trajectory.turn_rewards for trajectory in group.trajectories]


def _outcomes(group: PromptGroup, rewards: FloatArray) -> FloatArray:
    """What the ends of the answers earned [G]: their rewards without what their turns earned."""
    return rewards - np.array([sum(turns) for turns in _turn_rewards(group)], dtype=np.float64)


def make_samples(groups: list[PromptGroup], options: BatchOptions) -> list[TrainSample]:
    """Advantages (they need rewards alone), then one sample per trajectory, in order. With
    `options.rewards_alone` the rewards are where advantages are, 0 where scoring failed."""
    rewards = [shaped_rewards(group, options) for group in groups]
    advantages: Sequence[Sequence[float | FloatArray]]
    if options.rewards_alone:
        advantages = [np.nan_to_num(values, nan=0.0).tolist() for values in rewards]
    elif options.credit == "turn":
        outcomes = [_outcomes(group, values) for group, values in zip(groups, rewards, strict=True)]
        advantages = turn_advantages(options.advantage, outcomes, [_turn_rewards(group) for group in groups])
    else:
        advantages = [values.tolist() for values in step_advantages(options.advantage, rewards)]
    return [
        to_sample(trajectory, advantage, media_row_of(group), teacher=options.teacher)
        for group, values in zip(groups, advantages, strict=True)
        for trajectory, advantage in zip(group.trajectories, values, strict=True)
    ]


def media_row_of(group: PromptGroup) -> int:
    """The row of the data whose media the learner must read for this group; -1 where there are none."""
    return group.prompt.row if has_media(group.prompt.content) else -1


def loss_denominator(samples: list[TrainSample], aggregation: str, loss_length: int | None = None) -> float:
    """What the loss of the whole optimizer step is divided by (`algorithms.denominators`)."""
    return step_denominator((sum(sample.loss_mask) for sample in samples), aggregation, loss_length)


def train_steps(step: int, samples: list[TrainSample], options: BatchOptions) -> list[TrainStep]:
    """One `TrainStep` per policy rank, with equal numbers of micro-batches.

    A step without a single token to train on (all its prompts dropped, all answers empty or unscored) has
    no micro-batches and denominator 0: the policy counts it and changes nothing.
    """
    denominator = loss_denominator(samples, options.aggregation, options.loss_length)
    if denominator == 0:
        return [TrainStep(step) for _ in range(options.data_parallel * options.ranks_per_replica)]
    parts = _mini_batches(step, samples, options)
    plans = [_packed(part, options) for part in parts]
    mini_batches: list[MiniBatch] = []
    for part, plan in zip(parts, plans, strict=True):
        start = mini_batches[-1].end if mini_batches else 0
        counted = loss_denominator(part, options.aggregation, options.loss_length)
        mini_batches.append(MiniBatch(start, start + len(plan[0]), counted))
    commands = []
    for rank in range(options.data_parallel):
        command = TrainStep(
            step=step,
            micro_batches=[MicroBatch(samples) for plan in plans for samples in plan[rank]],
            denominator=denominator,
            mini_batches=mini_batches if len(mini_batches) > 1 else [],
        )
        commands += [command] * options.ranks_per_replica
    return commands


def _mini_batches(step: int, samples: list[TrainSample], options: BatchOptions) -> list[list[TrainSample]]:
    """The step's samples, shuffled by seed and step, in parts of one size (or one less)."""
    if options.mini_batches == 1:
        return [samples]
    order = np.random.default_rng((options.seed, step)).permutation(len(samples))
    parts = np.array_split(order, min(options.mini_batches, len(samples)))
    return [[samples[i] for i in sorted(part.tolist())] for part in parts]


def _packed(samples: list[TrainSample], options: BatchOptions) -> list[list[list[TrainSample]]]:
    """`result[rank][micro_batch]`, equally many for all ranks."""
    lengths = [len(sample.token_ids) for sample in samples]
    if options.micro_batch_size is not None:
        plan = pack_fixed(lengths, options.micro_batch_size, options.data_parallel)
    else:
        budget = options.micro_batch_tokens or max(lengths)
        plan = pack(lengths, budget, options.data_parallel, attention=options.pair_cost)
    return [[[samples[i] for i in indices] for indices in rank] for rank in plan]


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
    def of(
        cls,
        step: int,
        groups: list[PromptGroup],
        options: BatchOptions,
        *,
        dropped: Sequence[PromptGroup] = (),
    ) -> PreparedStep:
        """`dropped` were generated and teach nothing: they count in the means of rewards and lengths."""
        samples = make_samples(groups, options)
        everything = [*groups, *dropped]
        signal = None if options.rewards_alone else groups_with_signal(everything, samples)
        metrics = {**rollout_metrics(everything, step - 1, signal), "rollout/groups": float(len(groups))}
        return cls(step, train_steps(step, samples, options), metrics | staleness(groups, step - 1))


def staleness(groups: Sequence[PromptGroup], version: int) -> dict[str, float]:
    """How many versions older than `version` the oldest token of each trajectory is."""
    stale = np.array([version - t.oldest_version for group in groups for t in group.trajectories])
    if not len(stale):
        return {}
    return {
        "rollout/staleness_mean": float(stale.mean()),
        "rollout/staleness_max": float(stale.max()),
    }


def groups_with_signal(groups: list[PromptGroup], samples: list[TrainSample]) -> list[bool]:
    """For each group whether any of its samples has an advantage other than 0, or a teacher's word."""
    taught = {s.ordinal for s in samples if any(s.advantages) or (s.teacher_log_probs and any(s.loss_mask))}
    return [group.prompt.ordinal in taught for group in groups]


def rollout_metrics(
    groups: list[PromptGroup], version: int, signal: Sequence[bool] | None = None
) -> dict[str, float]:
    """What the batch says of the rollouts: rewards, lengths, staleness against `version`. `signal` tells
    which groups teach something (default: those whose answers differ in reward)."""
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories:
        return {}
    rewards = np.array([t.reward for t in trajectories])  # NaN: could not be scored
    lengths = np.array([len(t.token_ids) for t in trajectories])
    if signal is None:
        signal = [has_signal(raw_rewards(group)) for group in groups]
    counted = {name for t in trajectories for name in t.metrics}
    metrics = {
        "rollout/reward_mean": float(np.nanmean(rewards)),
        "rollout/reward_std": float(np.nanstd(rewards)),
        "rollout/unscored": float(np.isnan(rewards).mean()),
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": float(np.mean([t.finish == "length" for t in trajectories])),
        "rollout/zero_variance_groups": 1.0 - float(np.mean(signal)),
        "rollout/tokens": float(lengths.sum()),
        "rollout/groups": float(len(groups)),
        **staleness(groups, version),
        **{f"rollout/{n}": float(np.mean([t.metrics.get(n, 0.0) for t in trajectories])) for n in counted},
    }
    for name in sorted({name for t in trajectories for name in t.rewards}):
        scores = [t.rewards[name] for t in trajectories if name in t.rewards]
        metrics[f"reward/{name}"] = float(np.mean(scores))
        metrics[f"reward/{name}_unscored"] = 1.0 - len(scores) / len(trajectories)
    return metrics
