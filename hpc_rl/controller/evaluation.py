"""Greedy evaluation on the training replicas, at one policy version at a time.

While an evaluation runs no new weights are pushed, so all of its answers come from one version; training
goes on meanwhile as far as the staleness bound lets it. `eval/accuracy` is the mean score of the first
reward of the recipe, `eval/<reward>` that of each, `eval/reward_mean` their weighted sum.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from hpc_rl.bus.messages import Generate, GroupDone, GroupFailed
from hpc_rl.recipe.schema import Eval
from hpc_rl.types import Prompt, Sampling, Trajectory

LOG = logging.getLogger("hpc_rl.controller")


def eval_due(options: Eval, step: int, total_steps: int) -> bool:
    """Whether step `step` (0: before training) is one of those to evaluate."""
    if step == 0:
        return options.before
    return step == total_steps or (options.every > 0 and step % options.every == 0)


@dataclass
class Evaluation:
    """One pass over the evaluation prompts. `pending` are not handed out yet."""

    step: int
    pending: list[int]
    in_flight: dict[int, tuple[int, int]] = field(default_factory=dict)
    answers: list[Trajectory] = field(default_factory=list)
    failed: int = 0

    @property
    def tag(self) -> str:
        return f"step-{self.step}"

    @property
    def finished(self) -> bool:
        return not self.pending and not self.in_flight


class Evaluator:
    """Decides when to evaluate and keeps the one evaluation that is under way."""

    def __init__(
        self, options: Eval, prompts: list[Prompt], *, primary: str, max_tokens: int, seed: int
    ) -> None:
        self.options, self.prompts, self.primary = options, prompts, primary
        self.sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=max_tokens, seed=seed)
        self.current: Evaluation | None = None
        self.done_steps: set[int] = set()

    def due(self, step: int, total_steps: int) -> bool:
        """True if step `step` (0: before training) is to be evaluated and was not yet."""
        if not self.prompts or step in self.done_steps:
            return False
        return eval_due(self.options, step, total_steps)

    def begin(self, step: int) -> None:
        assert self.current is None
        self.done_steps.add(step)
        self.current = Evaluation(step, list(range(len(self.prompts)))[::-1])

    def next_request(self, replica: int, incarnation: int) -> Generate | None:
        """A prompt for this replica, or None when all are handed out."""
        if self.current is None or not self.current.pending:
            return None
        index = self.current.pending.pop()
        self.current.in_flight[index] = (replica, incarnation)
        prompt = self.prompts[index]
        return Generate(prompt, 1, self.sampling, purpose="eval", tag=f"{self.current.tag}:{index}")

    def answered(self, message: GroupDone | GroupFailed) -> dict[str, float] | None:
        """Take one answer; the metrics of the whole evaluation once it is finished, else None."""
        tag, _, index = message.tag.rpartition(":")
        now = self.current
        owner = (message.replica, message.incarnation)
        if now is None or tag != now.tag or now.in_flight.get(int(index)) != owner:
            return None
        del now.in_flight[int(index)]
        if isinstance(message, GroupDone):
            now.answers += message.group.trajectories
        else:
            now.failed += 1
            LOG.warning("evaluation prompt %s failed: %s", index, message.cause)
        return self._finish(now) if now.finished else None

    def give_back(self, replica: int) -> None:
        """The replica is lost: its evaluation prompts are handed out again."""
        if self.current is None:
            return
        for index, owner in list(self.current.in_flight.items()):
            if owner[0] == replica:
                del self.current.in_flight[index]
                self.current.pending.append(index)

    def _finish(self, now: Evaluation) -> dict[str, float]:
        self.current = None
        asked = len(now.answers) + now.failed
        metrics = {"eval/prompts": float(asked), "eval/failed": float(now.failed)}
        if now.answers:
            metrics["eval/reward_mean"] = float(np.mean([t.reward for t in now.answers]))
            metrics["eval/length_mean"] = float(np.mean([len(t.token_ids) for t in now.answers]))
            for name in sorted({name for t in now.answers for name in t.rewards}):
                # A prompt that failed was not answered right: it counts as zero.
                metrics[f"eval/{name}"] = float(sum(t.rewards.get(name, 0.0) for t in now.answers) / asked)
            metrics["eval/accuracy"] = metrics.get(f"eval/{self.primary}", metrics["eval/reward_mean"])
        return metrics
