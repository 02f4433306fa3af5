"""Trajectories get what models say of them: the scores of the reward group, the teacher's log-probs.

Both are asked at once, for all trajectories of a prompt group. What is not answered costs the sample: its
reward is NaN, and it is not trained on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

from hpc_rl.bus import messages as m
from hpc_rl.bus.client import Bus
from hpc_rl.data.chat import as_messages
from hpc_rl.plan.groups import scoring_roles
from hpc_rl.recipe.extensions import is_served
from hpc_rl.recipe.schema import DatasetSpec, Recipe
from hpc_rl.rewards.base import RewardSpec, reward_specs
from hpc_rl.rollout.prompts import prompt_text
from hpc_rl.rollout.scoring import ScoringClient, ScoringFailed
from hpc_rl.types import Trajectory


def served_specs(recipe: Recipe) -> list[RewardSpec]:
    """The rewards of the recipe that the reward group serves."""
    items = zip(reward_specs(recipe.reward), recipe.reward, strict=True)
    return [spec for spec, item in items if is_served(item)]


class ModelScores:
    """What one replica asks of the groups. Without any it does nothing."""

    def __init__(self, recipe: Recipe, bus: Bus, replica: int, incarnation: int) -> None:
        self._weights = {spec.key: spec.weight for spec in served_specs(recipe)}
        limits: dict[str, float] = {}
        roles = scoring_roles(recipe)
        if "reward" in roles:
            limits["reward"] = sum(spec.limit_s for spec in served_specs(recipe))
        if "teacher" in roles and recipe.teacher is not None:
            limits["teacher"] = recipe.teacher.limit_s
        self._client = ScoringClient(bus, replica, incarnation, limits)

    def start(self) -> None:
        self._client.start()

    async def close(self) -> None:
        await self._client.close()

    async def complete(
        self, request: m.Generate, trajectories: Sequence[Trajectory], spec: DatasetSpec
    ) -> list[str]:
        """Add rewards and teacher log-probs to `trajectories`, which have their other rewards. Why some of
        them have no reward any more, one line each."""
        if not self._client.roles:
            return []
        tasks = [self._one(request, trajectory, spec) for trajectory in trajectories]
        return [error for error in await asyncio.gather(*tasks) if error]

    async def _one(self, request: m.Generate, trajectory: Trajectory, spec: DatasetSpec) -> str:
        if math.isnan(trajectory.reward):
            return ""  # lost already: it is not trained on
        wanted = [self._reward(request, trajectory, spec)] if "reward" in self._client.roles else []
        if "teacher" in self._client.roles and request.purpose != "eval":
            wanted.append(self._teacher(request, trajectory))
        errors = [error for error in await asyncio.gather(*wanted) if error]
        if errors:
            trajectory.reward = math.nan
        return "; ".join(errors)

    async def _reward(self, request: m.Generate, trajectory: Trajectory, spec: DatasetSpec) -> str:
        prompt = request.prompt
        content = prompt.content

        def make(number: int, stream: str) -> m.Message:
            return m.ScoreAnswer(
                number=number,
                reply_to=stream,
                conversation=content if isinstance(content, list) else as_messages(content, spec),
                prompt=prompt_text(content),
                response=trajectory.text,
                answer=prompt.answer,
                fields=prompt.fields,
            )

        try:
            answer: Any = await self._client.ask("reward", make)
        except ScoringFailed as error:
            return str(error)
        trajectory.rewards = {**trajectory.rewards, **answer.scores}
        trajectory.reward += sum(self._weights[key] * value for key, value in answer.scores.items())
        return "; ".join(answer.errors.values())

    async def _teacher(self, request: m.Generate, trajectory: Trajectory) -> str:
        def make(number: int, stream: str) -> m.Message:
            return m.ScoreTokens(
                number=number,
                reply_to=stream,
                prompt_ids=trajectory.prompt_ids,
                token_ids=trajectory.token_ids,
                temperature=request.sampling.temperature,
            )

        try:
            answer: Any = await self._client.ask("teacher", make)
        except ScoringFailed as error:
            return str(error)
        trajectory.teacher_log_probs = answer.log_probs
        return str(answer.error)
