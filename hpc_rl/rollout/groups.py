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
from hpc_rl.rollout.engine import Engine, PromptError, Sample
from hpc_rl.rollout.model_scores import ModelScores
from hpc_rl.rollout.prompts import PromptCodec, prompt_text
from hpc_rl.types import PromptGroup, Trajectory


class GroupRunner:
    """Generates and scores prompt groups on one engine; many calls of `answer` may be under way."""

    def __init__(
        self,
        process: RoleProcess,
        engine: Engine,
        codec: PromptCodec,
        pool: ScorerPool,
        models: ModelScores,
    ) -> None:
        self.process, self.engine, self.codec, self.pool = process, engine, codec, pool
        self.models = models
        self.served = 0

    async def answer(self, request: m.Generate) -> m.GroupDone | m.GroupFailed:
        """Raises EngineError when the engine is lost."""
        try:
            return await self._generate_and_score(request)
        except PromptError as error:
            return self._group_failed(request, str(error))

    async def _generate_and_score(self, request: m.Generate) -> m.GroupDone | m.GroupFailed:
        prompt = request.prompt
        began = time.monotonic()
        ids = self.codec.encode(prompt.content, self._dataset(request.purpose))
        self.served += 1
        request_id = f"{request.purpose}-{prompt.ordinal}-{self.served}"
        samples = await self.engine.generate(ids, request.sampling, request.group_size, request_id)
        if any(sample.finish == "abort" for sample in samples):
            return self._group_failed(request, "generation was aborted")
        generated = time.monotonic()
        texts = [self.codec.decode(sample.token_ids) for sample in samples]
        question = prompt_text(prompt.content)
        scored = await asyncio.gather(
            *(
                self.pool.score(question, text, prompt.answer, prompt.fields, self._info(request, sample))
                for text, sample in zip(texts, samples, strict=True)
            )
        )
        errors = [score.error for score in scored if score.error]
        seconds = generated - began
        trajectories = [
            self._trajectory(request, ids, i, sample, text, score, seconds)
            for i, (sample, text, score) in enumerate(zip(samples, texts, scored, strict=True))
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
            "rollout/tokens": float(sum(len(sample.token_ids) for sample in samples)),
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

    @staticmethod
    def _info(request: m.Generate, sample: Sample) -> SampleInfo:
        return SampleInfo(len(sample.token_ids), sample.finish, request.sampling.max_tokens)

    def _trajectory(
        self,
        request: m.Generate,
        prompt_ids: list[int],
        index: int,
        sample: Sample,
        text: str,
        scored: Scored,
        seconds: float,
    ) -> Trajectory:
        """A sample without a score gets NaN: it counts neither in the group's mean nor in the loss."""
        return Trajectory(
            ordinal=request.prompt.ordinal,
            sample=index,
            replica=self.process.index,
            prompt_ids=prompt_ids,
            token_ids=sample.token_ids,
            log_probs=sample.log_probs,
            spans=sample.spans,
            finish=sample.finish,
            text=text,
            rewards=scored.scores,
            reward=math.nan if scored.error else scored.total,
            seconds=seconds,
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
