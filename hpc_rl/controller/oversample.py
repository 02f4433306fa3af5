"""Over-sampling: more prompt groups are started than steps need, and the slowest are cancelled.

With E = `oversample` * B further groups, n(d) <= B*(d-t) + E is what may be outstanding (`window.py`), and
step s takes the first B that are finished. What is due at step s and not taken is cancelled and its prompt
handed out again, before all others, once: from then on it is *kept*, has a place like any group without
over-sampling, and is waited for. So no prompt is lost, none is cancelled twice, and the staleness is
bounded as before. But this is **biased against long answers**: of a prompt's first answers the slow ones
never train, and the second ones are new draws. That is the price of steps that do not wait for the tail.

Kept groups come first in a step. For them alone n(d) <= B*(d-t) is kept, by admission and by steps, as the
proof there has it; the others give way.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hpc_rl.controller.window import ORDERS, Answer, Chosen, PromptWindow
from hpc_rl.recipe.schema import Recipe


@dataclass
class OversampledWindow(PromptWindow):
    """`extra` groups are outstanding beyond what steps need. `Chosen.cancelled` is told to the replicas."""

    extra: int = 0

    def _fits(self, ordinal: int, version: int) -> bool:
        deadline = version + self.max_staleness + 1
        if deadline <= self.steps_taken:
            return False
        mine = {**{o: self._deadline(f) for o, f in self.in_flight.items()},
                **{o: answer.deadline for o, answer in self.done.items()}}  # fmt: skip
        fits = self._within([*mine.values(), deadline], self.steps_taken, self.extra)
        if ordinal in self.kept:
            hard = [due for o, due in mine.items() if o in self.kept]
            fits = fits and self._within([*hard, deadline], self.steps_taken, 0)
        return fits

    def _within(self, deadlines: Iterable[int], taken: int, extra: int) -> bool:
        """Whether n(d) <= B*(d-taken) + extra for every d."""
        count = 0
        for due, groups in sorted(Counter(deadlines).items()):
            count += groups
            if count > self.prompts_per_step * (due - taken) + extra:
                return False
        return True

    def _feasible(self) -> bool:
        step, chosen = self.steps_taken + 1, {answer.ordinal for answer in self._choice()}
        flying = {ordinal: self._deadline(flight) for ordinal, flight in self.in_flight.items()}
        left = {**flying, **{o: answer.deadline for o, answer in self.done.items() if o not in chosen}}
        hard = [due for ordinal, due in left.items() if ordinal in self.kept]
        if not self._within(hard, step, 0):
            return False
        return not flying or self._within(left.values(), step, self.extra)

    def _choice(self) -> list[Answer]:
        order = sorted(self.done.values(), key=lambda a: (a.ordinal not in self.kept, a.deadline, a.ordinal))
        return order[: self.prompts_per_step]

    def reserve(self) -> Chosen:
        chosen = super().reserve()
        self.kept -= {answer.ordinal for answer in chosen.answers}
        due = chosen.step
        cancelled = {o: flight for o, flight in self.in_flight.items() if self._deadline(flight) <= due}
        late = [answer for answer in self.done.values() if answer.deadline <= due]
        for ordinal, flight in cancelled.items():
            del self.in_flight[ordinal]
            self._leave(self._deadline(flight))
        for answer in late:
            del self.done[answer.ordinal]
            self._finished[answer.deadline] -= 1
            self._leave(answer.deadline)
        again = [*cancelled, *(answer.ordinal for answer in late if not answer.reason)]
        for ordinal in again:
            heapq.heappush(self._returned, ordinal)
        self.kept |= set(again)
        drops = {answer.ordinal: answer.reason for answer in late if answer.reason}
        self.ahead = replace(
            chosen, cancelled=list(cancelled.values()), again=len(again), drops={**chosen.drops, **drops},
            answers=[*chosen.answers, *(answer for answer in late if answer.reason)],
        )  # fmt: skip
        return self.ahead


def cancelled_flights(chosen: Chosen) -> dict[int, list[str]]:
    """replica -> tags of what it need not finish."""
    found: dict[int, list[str]] = {}
    for flight in chosen.cancelled:
        found.setdefault(flight.replica, []).append(flight.tag)
    return found


def make_window(recipe: Recipe, algorithm: Any, rows: int) -> PromptWindow:
    """The window that a recipe asks for, over a data set of so many rows."""
    rollout, policy = recipe.rollout, recipe.policy
    assert rollout is not None
    size = policy.batch_size // algorithm.group_size
    sizes = {
        "prompts_per_step": size,
        "max_staleness": algorithm.max_staleness,
        "total_prompts": policy.epochs * rows if policy.epochs else None,
        "total_steps": policy.steps or 0,
        "max_refill": algorithm.max_refill if algorithm.drop_zero_variance else 0.0,
    }
    if rollout.oversample > 0:
        return OversampledWindow(**sizes, extra=math.ceil(rollout.oversample * size))
    return ORDERS[rollout.order](**sizes)
