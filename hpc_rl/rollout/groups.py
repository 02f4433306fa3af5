"""From one `Generate` to its answer: tokens, texts, scores, trajectories.

What goes wrong with one prompt or one sample stays with it: the answer is then a `GroupFailed`, or a
trajectory whose reward is NaN. Only an engine that is lost raises.
"""

from __future__ import annotations

import asyncio
import math
import time

from hpc_rl.bus import messages as m
from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.rewards.base import SampleInfo
from hpc_rl.rewards.pool import Scored, ScorerPool
from hpc_rl.roles import RoleProcess
from hpc_rl.rollout.engine import Engine, PromptError
from hpc_rl.rollout.episodes import Episode, EpisodeRunner, one_turn
from hpc_rl.rollout.media import MediaLoader
from hpc_rl.rollout.model_scores import ModelScores
from hpc_rl.rollout.prompts import PromptCodec, prompt_text
from hpc_rl.simulators.base import SimulatorError
from hpc_rl.types import PromptGroup, Trajectory


class GroupRunner:
    """Generates and scores prompt groups on one engine; many calls of `answer` may be under way.

    With `episodes` an answer is an episode of several turns.
    """

    def __init__(
        self,
        process: RoleProcess,
        engine: Engine,
        codec: PromptCodec,
        pool: ScorerPool,
        models: ModelScores,
        episodes: EpisodeRunner | None = None,
    ) -> None:
        self.process, self.engine, self.codec, self.pool = process, engine, codec, pool
        self.models, self.episodes = models, episodes
        self.media = MediaLoader(process.recipe, process.run_dir)
        self.served = 0

    async def answer(self, request: m.Generate) -> m.GroupDone | m.GroupFailed:
        """Raises EngineError when the engine is lost."""
        try:
            return await self._generate_and_score(request)
        except (PromptError, SimulatorError) as error:
            return self._group_failed(request, str(error))

    async def _generate_and_score(self, request: m.Generate) -> m.GroupDone | m.GroupFailed:
        prompt = request.prompt
        began = time.monotonic()
        self.served += 1
        episodes = await self._generate(request, f"{request.purpose}-{prompt.ordinal}-{self.served}")
        if any(episode.sample.finish == "abort" for episode in episodes):
            return self._group_failed(request, "generation was aborted")
        generated = time.monotonic()
        texts = [self.codec.decode(episode.answer_ids) for episode in episodes]
        question = prompt_text(prompt.content)
        scored = await asyncio.gather(
            *(
                self.pool.score(question, text, prompt.answer, prompt.fields, self._info(request, episode))
                for text, episode in zip(texts, episodes, strict=True)
            )
        )
        errors = [score.error for score in scored if score.error]
        seconds = generated - began
        trajectories = [
            self._trajectory(request, i, episode, text, score, seconds)
            for i, (episode, text, score) in enumerate(zip(episodes, texts, scored, strict=True))
        ]
        errors += await self.models.complete(request, trajectories, self._dataset(request.purpose))
        if len(errors) == len(scored):
            return self._group_failed(request, f"no sample could be scored: {errors[0]}")
        if errors:
            self.process.log.warning(
                "prompt %d: %d of %d samples have no score: %s",
                prompt.ordinal,
                len(errors),
                len(scored),
                errors[0],
            )
        metrics = {
            "rollout/generate_s": seconds,
            "rollout/score_s": time.monotonic() - generated,
            "rollout/tokens": float(sum(len(episode.sample.token_ids) for episode in episodes)),
            "rollout/unscored": float(len(errors)),
        }
        return m.GroupDone(
            replica=self.process.index,
            incarnation=self.process.incarnation,
            purpose=request.purpose,
            tag=request.tag,
            group=PromptGroup(prompt, trajectories),
            metrics=metrics,
        )

    async def _generate(self, request: m.Generate, request_id: str) -> list[Episode]:
        prompt, spec = request.prompt, self._dataset(request.purpose)
        media = await self.media.open(prompt, spec)
        if self.episodes is not None:
            if media is not None:
                raise PromptError("an episode of several turns cannot begin with images or videos")
            return await self.episodes.play(prompt, spec, request.sampling, request.group_size, request_id)
        ids = self.codec.encode(prompt.content, spec) if media is None else media.token_ids
        extra = {} if media is None else {"media": media}  # an engine without vision need not know the word
        samples = await self.engine.generate(ids, request.sampling, request.group_size, request_id, **extra)
        return [one_turn(ids, sample) for sample in samples]

    @staticmethod
    def _info(request: m.Generate, episode: Episode) -> SampleInfo:
        sample = episode.sample
        return SampleInfo(len(sample.token_ids), sample.finish, request.sampling.max_tokens)

    def _trajectory(
        self,
        request: m.Generate,
        index: int,
        episode: Episode,
        text: str,
        scored: Scored,
        seconds: float,
    ) -> Trajectory:
        """A sample without a score gets NaN: it counts neither in the group's mean nor in the loss. What the
        environment gave for its turns is added to what the rewards gave for its end."""
        sample, rewards, total = episode.sample, scored.scores, scored.total
        if self.episodes is not None and self.episodes.rewarded:
            rewards = {**rewards, "simulator": sum(episode.turn_rewards)}
            total += rewards["simulator"]
        return Trajectory(
            ordinal=request.prompt.ordinal,
            sample=index,
            replica=self.process.index,
            prompt_ids=episode.prompt_ids,
            token_ids=sample.token_ids,
            log_probs=sample.log_probs,
            spans=sample.spans,
            finish=sample.finish,
            text=text,
            loss_mask=episode.loss_mask,
            rewards=rewards,
            reward=math.nan if scored.error else total,
            seconds=seconds,
            turn_ends=episode.turn_ends,
            turn_rewards=episode.turn_rewards,
            metrics=episode.metrics,
        )

    def _group_failed(self, request: m.Generate, cause: str) -> m.GroupFailed:
        return m.GroupFailed(
            replica=self.process.index,
            incarnation=self.process.incarnation,
            purpose=request.purpose,
            tag=request.tag,
            ordinal=request.prompt.ordinal,
            cause=cause,
        )

    def _dataset(self, purpose: str) -> DatasetSpec:
        data = self.process.recipe.data
        return data.eval if purpose == "eval" and data.eval is not None else data.train
