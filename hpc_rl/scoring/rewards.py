"""The reward group's work: each of its rewards scores each answer, and fails for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hpc_rl.bus import messages as m
from hpc_rl.scoring.base import Failed, Halving, Job, ScoringError, ServedReward


class RewardWork:
    """`Work` of the reward group. `rewards` are by the key that names them in metrics."""

    def __init__(self, rewards: Mapping[str, ServedReward]) -> None:
        self.rewards = rewards
        self.batch_tokens = min(reward.batch_tokens for reward in rewards.values())
        self._careful = {key: Halving(f"reward {key!r}") for key in rewards}

    def open(self, request: m.Message) -> Job:
        if not isinstance(request, m.ScoreAnswer):
            raise TypeError(f"the reward group cannot answer {type(request).__name__}")
        job = Job(request.number, request.reply_to, 0)
        for key, reward in self.rewards.items():
            try:
                job.parts[key], length = reward.open(request)
                job.length = max(job.length, length)
            except ScoringError as error:
                job.errors[key] = f"reward {key!r}: {error}"
            except Exception as error:  # noqa: BLE001 -- a chat template or a plugin may raise anything
                job.errors[key] = f"reward {key!r}: {type(error).__name__}: {error}"
        return job

    def run(self, jobs: Sequence[Job]) -> list[m.Message]:
        scores: list[dict[str, float]] = [{} for _ in jobs]
        for key, reward in self.rewards.items():
            ready = [(index, job.parts[key]) for index, job in enumerate(jobs) if key in job.parts]
            values = self._careful[key](reward.score, [part for _, part in ready])
            for (index, _), value in zip(ready, values, strict=True):
                if isinstance(value, Failed):
                    jobs[index].errors[key] = f"reward {key!r}: {value.words}"
                elif math.isfinite(value):
                    scores[index][key] = float(value)
                else:
                    jobs[index].errors[key] = f"reward {key!r} gave {value}, which is no score"
        return [m.AnswerScored(job.number, scores[i], job.errors) for i, job in enumerate(jobs)]
