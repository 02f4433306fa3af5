"""Which prompts may be handed out, which are in flight, which are done: first in, first trained.

Step s (1-based) trains exactly the prompts with ordinals [(s-1)*B, s*B), its *window* w = s-1. That makes
the order of training a function of the seed alone, loses and repeats nothing by construction, and is
not biased against long answers: a step waits for its slowest prompt instead of replacing it.

Staleness is bounded at admission. A prompt of window w is trained when the policy has version w (it has
done w steps). A replica with acknowledged version v may start it only if `w - v <= max_staleness`; all
of its tokens then come from version v or newer, so version at training minus version at generation is
at most `max_staleness` for every token. With `max_staleness = 0` generation and training alternate.

Example, B = 2, max_staleness = 1, replica at version 0::

    admits ordinals 0 1 (window 0) and 2 3 (window 1), then waits for version 1.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from hpc_rl.types import PromptGroup


@dataclass
class PromptWindow:
    """The state of all prompts that are handed out and not trained yet."""

    prompts_per_step: int
    max_staleness: int
    total_prompts: int
    next_ordinal: int = 0
    _returned: list[int] = field(default_factory=list)
    in_flight: dict[int, tuple[int, int]] = field(default_factory=dict)  # ordinal -> (replica, incarnation)
    done: dict[int, PromptGroup] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1 or self.max_staleness < 0:
            raise ValueError(
                f"prompts_per_step must be >= 1 and max_staleness >= 0, not "
                f"{self.prompts_per_step} and {self.max_staleness}"
            )

    @property
    def total_steps(self) -> int:
        """Steps until every prompt is trained; the last one may be smaller."""
        return -(-self.total_prompts // self.prompts_per_step)

    def ordinals(self, step: int) -> range:
        """The ordinals that step `step` (1-based) trains."""
        first = (step - 1) * self.prompts_per_step
        return range(first, min(first + self.prompts_per_step, self.total_prompts))

    def admit(self, replica_version: int) -> int | None:
        """The next ordinal that a replica at `replica_version` may start, or None. Changes nothing."""
        ordinal = self._returned[0] if self._returned else self.next_ordinal
        if ordinal >= self.total_prompts:
            return None
        staleness = ordinal // self.prompts_per_step - replica_version
        return ordinal if staleness <= self.max_staleness else None

    def hand_out(self, ordinal: int, replica: int, incarnation: int) -> None:
        """Record that `ordinal`, just admitted, went to a replica."""
        if self._returned and self._returned[0] == ordinal:
            heapq.heappop(self._returned)
        else:
            assert ordinal == self.next_ordinal, (ordinal, self.next_ordinal)
            self.next_ordinal += 1
        self.in_flight[ordinal] = (replica, incarnation)

    def finish(self, ordinal: int, replica: int, incarnation: int, group: PromptGroup) -> bool:
        """A group came back. False (and ignored) if it was meanwhile given to another replica."""
        if self.in_flight.get(ordinal) != (replica, incarnation):
            return False
        del self.in_flight[ordinal]
        self.done[ordinal] = group
        return True

    def drop(self, ordinal: int, replica: int, incarnation: int, reason: str) -> bool:
        """A prompt could not be generated or scored: it is counted, its step trains without it."""
        if self.in_flight.get(ordinal) != (replica, incarnation):
            return False
        del self.in_flight[ordinal]
        self.dropped[ordinal] = reason
        return True

    def give_back(self, replica: int) -> list[int]:
        """The replica is lost: its prompts are handed out again, before all others."""
        lost = sorted(ordinal for ordinal, owner in self.in_flight.items() if owner[0] == replica)
        for ordinal in lost:
            del self.in_flight[ordinal]
            heapq.heappush(self._returned, ordinal)
        return lost

    def ready(self, step: int) -> bool:
        """True once every prompt of `step` is done or dropped."""
        return all(ordinal in self.done or ordinal in self.dropped for ordinal in self.ordinals(step))

    def missing(self, step: int) -> list[int]:
        """Ordinals that `step` still waits for."""
        return [o for o in self.ordinals(step) if o not in self.done and o not in self.dropped]

    def groups(self, step: int) -> list[PromptGroup]:
        """What is done of `step`, in order."""
        return [self.done[o] for o in self.ordinals(step) if o in self.done]

    def take(self, step: int) -> tuple[list[PromptGroup], dict[int, str]]:
        """Remove and return the groups of `step` in order, and its drops with their reasons."""
        assert self.ready(step), f"step {step} waits for prompts {self.missing(step)}"
        ordinals = self.ordinals(step)
        groups = [self.done.pop(o) for o in ordinals if o in self.done]
        drops = {o: self.dropped.pop(o) for o in ordinals if o in self.dropped}
        return groups, drops

    def restore(self, steps_done: int, groups: list[PromptGroup], dropped: dict[int, str]) -> None:
        """Begin after `steps_done` steps with answers that were generated but not trained.

        What was in flight at the save is not in `groups` and will be handed out again.
        """
        first = steps_done * self.prompts_per_step
        kept = {group.prompt.ordinal: group for group in groups if group.prompt.ordinal >= first}
        kept_drops = {ordinal: reason for ordinal, reason in dropped.items() if ordinal >= first}
        self.done, self.dropped, self.in_flight = kept, kept_drops, {}
        self.next_ordinal = max([first - 1, *kept, *kept_drops]) + 1
        self._returned = [o for o in range(first, self.next_ordinal) if o not in kept and o not in kept_drops]
        heapq.heapify(self._returned)
