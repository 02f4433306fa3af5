"""What an evaluation measures: means over the samples asked for, and pass@k over the prompts.

A sample without an answer or a score counts as 0 in every mean and as a failure in pass@k: a checkpoint that
breaks the scorer, or its own prompts, must not look better than one that answers wrongly. So every mean
has the same denominator, prompts x samples, and `eval/reward_mean` is the weighted sum of the rewards'
means. How many these were is in `eval/failed` and `eval/unscored`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from hpc_rl.types import Trajectory


@dataclass(frozen=True)
class Answer:
    """What is kept of one sample. `reward` is NaN and `rewards` lacks names where scoring failed."""

    reward: float
    rewards: dict[str, float]
    tokens: int
    finish: str
    text: str = field(default="", repr=False)

    @classmethod
    def of(cls, trajectory: Trajectory, *, with_text: bool) -> Answer:
        text = trajectory.text if with_text else ""
        return cls(trajectory.reward, trajectory.rewards, len(trajectory.token_ids), trajectory.finish, text)

    def as_json(self) -> dict[str, object]:
        reward = self.reward if math.isfinite(self.reward) else None
        return {**asdict(self), "reward": reward}

    def score(self, name: str) -> float:
        """The score of the reward `name`; 0 without one."""
        score = self.rewards.get(name, 0.0)
        return score if math.isfinite(score) else 0.0

    def succeeds(self, name: str, threshold: float) -> bool:
        return self.rewards.get(name, -math.inf) >= threshold


def pass_ks(samples: int) -> list[int]:
    """1, 2, 4, ... up to `samples`."""
    return [1 << power for power in range(samples.bit_length())]


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """The chance that at least one of `k` samples succeeds, unbiased: 1 - C(n-c, k) / C(n, k) (Chen et al.
    2021, "Evaluating Large Language Models Trained on Code", eq. 1)."""
    if not 0 <= successes <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {successes} successes among {samples} samples")
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def evaluation_metrics(
    answers: Sequence[Sequence[Answer]], *, failed: int, samples: int, primary: str, threshold: float
) -> dict[str, float]:
    """The metrics of one evaluation of `len(answers) + failed` prompts with `samples` answers each.

    A sample succeeds if its score of the reward `primary` is at least `threshold`. Where nothing at all
    could be scored there are only the counts: that evaluation has measured nothing.
    """
    every = [answer for group in answers for answer in group]
    scored = [answer for answer in every if math.isfinite(answer.reward)]
    prompts = len(answers) + failed
    asked = prompts * samples
    metrics = {"eval/prompts": float(prompts), "eval/failed": float(failed)}
    metrics["eval/unscored"] = 1.0 - len(scored) / asked
    if not scored:
        return metrics
    metrics["eval/reward_mean"] = sum(answer.reward for answer in scored) / asked
    for name in sorted({name for answer in every for name in answer.rewards}):
        metrics[f"eval/{name}"] = sum(answer.score(name) for answer in every) / asked
    metrics["eval/accuracy"] = metrics.get(f"eval/{primary}", metrics["eval/reward_mean"])
    wins = [sum(answer.succeeds(primary, threshold) for answer in group) for group in answers]
    for k in pass_ks(samples):
        metrics[f"eval/pass@{k}"] = sum(pass_at_k(samples, won, k) for won in wins) / prompts
    metrics["eval/length_mean"] = sum(answer.tokens for answer in every) / len(every)
    metrics["eval/truncated"] = sum(answer.finish == "length" for answer in every) / len(every)
    return metrics
