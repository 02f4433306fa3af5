"""Episodes of several turns: the policy writes, the environment answers, and nothing is tokenised twice.

The sequence that is sampled from is the one that is trained on: prompt, turn, the environment's words, turn,
and so on, each token where the engine saw it. Tokens of the environment have loss mask 0 and log-prob 0, and
count to the version of the turn before them. Each sample of a group is an episode of its own; they share the
prompt, and so the engine's prefix cache.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.rollout.dialogue import Dialogue
from hpc_rl.rollout.engine import Engine, PromptError, Sample
from hpc_rl.simulators.base import Result, Task, TextSimulator, Turn
from hpc_rl.simulators.config import TextConfig
from hpc_rl.types import Prompt, Sampling, VersionSpan


@dataclass
class Episode:
    """What a prompt became: `sample` is the whole of it. Of one turn `turn_ends` and `loss_mask` are empty.

    `answer_ids` is the last turn, which rewards are told. `finish` of the sample is `length` where tokens or
    turns ran out.
    """

    prompt_ids: list[int]
    sample: Sample
    answer_ids: list[int]
    loss_mask: list[int] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)


def one_turn(prompt_ids: list[int], sample: Sample) -> Episode:
    """An answer to a prompt as an episode."""
    return Episode(prompt_ids, sample, sample.token_ids)


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn of a sample, whose own is `seed`: the first has it, as a single answer would."""
    if turn == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % 2**31


class EpisodeRunner:
    """Plays episodes with one simulator on one engine; many may be under way."""

    def __init__(
        self, engine: Engine, simulator: TextSimulator, dialogue: Dialogue, config: TextConfig
    ) -> None:
        self._engine, self._simulator, self._dialogue, self._config = engine, simulator, dialogue, config
        self.rewarded = config.rewarded
        self._free: asyncio.Queue[int] = asyncio.Queue()
        for slot in range(simulator.slots):
            self._free.put_nowait(slot)

    async def play(
        self, prompt: Prompt, spec: DatasetSpec, sampling: Sampling, count: int, request_id: str
    ) -> list[Episode]:
        """`count` episodes of a prompt, in the order of their seeds.

        Raises PromptError, SimulatorError, or EngineError when the engine is lost; the other episodes are
        ended then.
        """
        task = Task(prompt.row, prompt.content, prompt.answer, prompt.fields)

        async def one(index: int) -> Episode:
            own = msgspec.structs.replace(sampling, seed=sampling.seed + index)
            slot = await self._free.get()
            try:
                return await self._episode(slot, task, spec, own, f"{request_id}-{index}")
            finally:
                self._free.put_nowait(slot)

        playing = [asyncio.create_task(one(index)) for index in range(count)]
        try:
            return await asyncio.gather(*playing)
        finally:
            for other in playing:
                other.cancel()
            await asyncio.gather(*playing, return_exceptions=True)

    async def _episode(
        self, slot: int, task: Task, spec: DatasetSpec, sampling: Sampling, request_id: str
    ) -> Episode:
        (seen,) = await self._simulator.reset([slot], [task], [sampling.seed])
        prompt_ids = self._dialogue.prompt_ids(task.content, seen, spec)
        episode = Episode(prompt_ids, Sample([], [], [], "length"), [])
        whole = episode.sample
        for turn in range(self._config.max_turns):
            room = self._room(episode, sampling.max_tokens)
            limit = min(room, self._config.max_turn_tokens or room)
            own = msgspec.structs.replace(sampling, seed=turn_seed(sampling.seed, turn), max_tokens=limit)
            ids = prompt_ids + whole.token_ids
            (written,) = await self._engine.generate(ids, own, 1, f"{request_id}-{turn}")
            _append_turn(episode, written)
            if written.finish == "abort":
                whole.finish = "abort"
                return episode
            words = Turn(self._dialogue.turn_text(written.token_ids), written.finish)
            (result,) = await self._simulator.step([slot], [words])
            _count(episode, result)
            if result.done or written.finish == "length":
                whole.finish = written.finish
                return episode
            if turn + 1 == self._config.max_turns:
                episode.metrics["out_of_turns"] = 1.0
                return episode
            ids = self._dialogue.observation_ids(result.observation, written.token_ids)
            if len(ids) >= self._room(episode, sampling.max_tokens):
                return episode  # not even one token of a next turn fits
            _append_observation(episode, ids)
        return episode

    def _room(self, episode: Episode, max_tokens: int) -> int:
        """How many tokens may follow, by the trajectory's bound and the model's. Raises PromptError: none."""
        done = len(episode.sample.token_ids)
        left = self._engine.max_model_len - len(episode.prompt_ids) - done
        if done == 0 and left < 1:
            raise PromptError(
                f"the prompt has {len(episode.prompt_ids)} tokens with its tools; at most "
                f"{self._engine.max_model_len - 1} fit (rollout.max_model_len)"
            )
        return min(max_tokens - done, left)


def _append_turn(episode: Episode, written: Sample) -> None:
    whole = episode.sample
    start = len(whole.token_ids)
    whole.token_ids += written.token_ids
    whole.log_probs += written.log_probs
    whole.spans += [VersionSpan(s.version, s.start + start, s.end + start) for s in written.spans]
    episode.loss_mask += [1] * len(written.token_ids)
    episode.turn_ends.append(len(whole.token_ids))
    episode.answer_ids = written.token_ids
    episode.metrics["turns"] = float(len(episode.turn_ends))


def _append_observation(episode: Episode, ids: list[int]) -> None:
    whole = episode.sample
    whole.token_ids += ids
    whole.log_probs += [0.0] * len(ids)
    episode.loss_mask += [0] * len(ids)
    last = whole.spans[-1]
    whole.spans[-1] = VersionSpan(last.version, last.start, len(whole.token_ids))


def _count(episode: Episode, result: Result) -> None:
    episode.turn_rewards.append(float(result.reward))
    _add(episode.metrics, result.info)


def _add(metrics: dict[str, float], info: Mapping[str, Any]) -> None:
    for name, value in info.items():
        metrics[name] = metrics.get(name, 0.0) + float(value)
