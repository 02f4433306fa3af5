"""Evaluation on the training replicas, at one policy version at a time.

While an evaluation runs no new weights are pushed, so all of its answers come from one version; training
goes on meanwhile as far as the staleness bound lets it. What it measures: `controller/scores.py`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from hpc_rl.bus.messages import Generate, GroupDone, GroupFailed
from hpc_rl.controller.prompts import PromptSource, prompt_seed
from hpc_rl.controller.scores import Answer, evaluation_metrics
from hpc_rl.recipe.schema import Eval, Recipe
from hpc_rl.types import Prompt, Sampling

LOG = logging.getLogger("hpc_rl.controller")


def eval_due(options: Eval, step: int, total_steps: int) -> bool:
    """Whether step `step` (0: before training) is one of those to evaluate."""
    if step == 0:
        return options.before
    return step == total_steps or (options.every > 0 and step % options.every == 0)


@dataclass
class Evaluation:
    """One pass over the evaluation prompts, by index. `pending` are not handed out yet; `failed` have no
    answers, with the reason."""

    step: int
    pending: list[int]
    in_flight: dict[int, tuple[int, int]] = field(default_factory=dict)
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return f"step-{self.step}"

    @property
    def finished(self) -> bool:
        return not self.pending and not self.in_flight


class Evaluator:
    """Decides when to evaluate and keeps the one evaluation that is under way (`current`); `last` is the one
    that ended last, with all its answers (their texts only with `keep_texts`). `seed` is the run's."""

    def __init__(
        self,
        options: Eval,
        prompts: list[Prompt],
        *,
        primary: str,
        max_tokens: int,
        seed: int,
        keep_texts: bool = False,
    ) -> None:
        self.options, self.prompts, self.primary = options, prompts, primary
        self.max_tokens, self.seed, self.keep_texts = max_tokens, seed, keep_texts
        self.current: Evaluation | None = None
        self.last: Evaluation | None = None
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
        return Generate(
            self.prompts[index],
            self.options.samples,
            self._sampling(index),
            purpose="eval",
            tag=f"{self.current.tag}:{index}",
        )

    def _sampling(self, index: int) -> Sampling:
        """Seeds are of the prompt alone: the same at every version and apart from the training's, so that
        what differs between two evaluations is the policy, and training does not notice."""
        return Sampling(
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            max_tokens=self.max_tokens,
            seed=prompt_seed(self.seed, "eval", index),
        )

    def answered(self, message: GroupDone | GroupFailed) -> dict[str, float] | None:
        """Take one answer; the metrics of the whole evaluation once it is finished, else None."""
        tag, _, index = message.tag.rpartition(":")
        now = self.current
        owner = (message.replica, message.incarnation)
        if now is None or tag != now.tag or now.in_flight.get(int(index)) != owner:
            return None
        del now.in_flight[int(index)]
        if isinstance(message, GroupDone):
            group = message.group.trajectories
            now.answers[int(index)] = [Answer.of(one, with_text=self.keep_texts) for one in group]
        else:
            now.failed[int(index)] = message.cause
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
        self.current, self.last = None, now
        return evaluation_metrics(
            [now.answers[index] for index in sorted(now.answers)],
            failed=len(now.failed),
            samples=self.options.samples,
            primary=self.primary,
            threshold=self.options.threshold,
        )


def evaluator_of(recipe: Recipe, base: Path, *, keep_texts: bool = False) -> Evaluator:
    """The evaluator of a recipe with rollouts; without `data.eval` it has no prompts. Raises DataError."""
    assert recipe.rollout is not None
    spec = recipe.data.eval
    return Evaluator(
        recipe.eval,
        PromptSource(spec, base=base, seed=0).in_file_order() if spec is not None else [],
        primary=str(recipe.reward[0]["name"]) if recipe.reward else "",
        max_tokens=recipe.eval.max_tokens or recipe.rollout.max_tokens,
        seed=recipe.seed,
        keep_texts=keep_texts,
    )
