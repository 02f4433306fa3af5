"""The optimizer updates of one step on rollouts, and what they have in common.

A step is the whole batch: one version of the weights, one command, one point of the schedule. With
`policy.updates` it is trained in several updates, for which some numbers are made once, before the first:
the reference's log-probs, the trainer's own (`proximal: recompute`), and with the KL in the reward the
advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hpc_rl.algorithms.config import RlConfig
from hpc_rl.bus.messages import MiniBatch, TrainStep
from hpc_rl.policy.batching import Fixed
from hpc_rl.policy.penalised_rewards import advantages_of
from hpc_rl.policy.step import Reduced, StepRunner
from hpc_rl.recipe.schema import Updates
from hpc_rl.types import TrainSample


@dataclass(frozen=True)
class Update:
    """One optimizer update: this rank's micro-batches, and for each what was made before the step (or
    None)."""

    micro_batches: list[list[TrainSample]]
    denominator: float
    fixed: list[Fixed] | None = None


class RolloutUpdates:
    """Makes the updates of a step, the same number of them and of forwards on every rank."""

    def __init__(self, runner: StepRunner, config: RlConfig, options: Updates, seed: int) -> None:
        self.runner, self.config, self.options, self.seed = runner, config, options, seed

    def of(self, command: TrainStep) -> list[Update]:
        """Those of `command` in their order, which the recipe's seed, the step and the epoch give."""
        micro_batches = [micro_batch.samples for micro_batch in command.micro_batches]
        whole = [MiniBatch(0, len(micro_batches), command.denominator)]
        parts = [part for part in command.mini_batches or whole if part.denominator > 0]
        order: list[MiniBatch] = []
        for epoch in range(self.options.epochs):
            dice = np.random.default_rng((self.seed, command.step, epoch))
            order += [parts[i] for i in dice.permutation(len(parts))]
        if len(order) < 2 and not self.config.penalised_rewards:
            return [Update(micro_batches[p.start : p.end], p.denominator) for p in order]
        fixed = self._prepare(command.step, micro_batches, several=len(order) > 1)
        return [
            Update(
                micro_batches[part.start : part.end],
                part.denominator,
                [replace(one, progress=number / len(order)) for one in fixed[part.start : part.end]],
            )
            for number, part in enumerate(order)
        ]

    @torch.no_grad()
    def _prepare(self, step: int, micro_batches: list[list[TrainSample]], several: bool) -> list[Fixed]:
        """One forward of the trainer's model over all micro-batches where it is needed, and one of the
        reference's. A collective: all ranks have equally many."""
        runner, config = self.runner, self.config
        recompute = several and config.proximal == "recompute"
        found, packed = [], []
        for samples in micro_batches:
            batch = runner.pack(samples, 1.0)
            proximal: Tensor | None = None
            if recompute:
                proximal, _ = runner.model.log_probs(batch.row, config.temperature)
            found.append(Fixed(batch.tokens.reference_log_probs, proximal, start_version=step - 1))
            packed.append(batch.tokens)
        if recompute and runner.sharded:
            runner.model.module.reshard()  # a forward without backward leaves the root's parameters whole
        if config.penalised_rewards:
            advantages = advantages_of(list(zip(micro_batches, packed, strict=True)), config, runner.ranks)
            found = [replace(one, advantages=own) for one, own in zip(found, advantages, strict=True)]
        return found


def together(updates: list[Reduced]) -> Reduced:
    """The numbers of a step of several updates: sums over all of them, the largest maxima; loss, gradient
    norm and what is divided already are means over the updates."""
    if len(updates) == 1:
        return updates[0]
    names = updates[0].sums.keys()
    means = {"loss", *updates[0].shares}
    sums = {name: sum(update.sums[name] for update in updates) for name in names}
    return replace(
        updates[0],
        sums={name: value / len(updates) if name in means else value for name, value in sums.items()},
        maxima={name: max(update.maxima[name] for update in updates) for name in updates[0].maxima},
        grad_norm=sum(update.grad_norm for update in updates) / len(updates),
    )
