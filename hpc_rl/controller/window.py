"""Which prompts may be handed out, which are in flight, which wait for a step: earliest deadline first.

A prompt group that a replica at acknowledged version v starts has tokens of version v or newer (weights
change in flight, never back). Step s trains on policy version s-1. So the group's tokens are at most
`max_staleness` S versions old if and only if it is trained at a step s with s-1-v <= S: it has the
*deadline* D = v+S+1. Write B for the groups of a step, t for the steps taken so far, and n(d) for the
groups with deadline <= d that are handed out and not taken yet.

Invariant: n(d) <= B*(d-t) for every d > t, and no group has a deadline <= t.
- *Admission* keeps it: a group with deadline D starts only if afterwards n(d) <= B*(d-t) for all d >= D.
- A *step* keeps it: step s = t+1 takes the B finished groups with the earliest deadlines, and is ready only
  when those that stay satisfy n(d) <= B*(d-s) for every d >= s. For d = s: none of deadline s stays.
- It never waits in vain: once all groups in flight are finished, the B earliest will do, for n(d) falls by B
  or to 0. And below B groups there is room for more at any replica that has version t-S or newer.
So every group that was started is trained by its deadline, for every token the staleness is at most S, none
is too old the moment it is born, and none is dropped or replaced for being long: a long answer is trained
later, by at most S steps. With S = 0 all deadlines are the next step's, and a step is the next B ordinals.

Example, B = 2, S = 1, a replica at version 0: it may start two groups for step 1 and two more for step 2::

    >>> window = PromptWindow(prompts_per_step=2, max_staleness=1, total_prompts=10)
    >>> while (ordinal := window.admit(version=0)) is not None:
    ...     tag = window.hand_out(ordinal, Flight(replica=0, incarnation=1, version=0))
    >>> sorted(window.in_flight), window.admit(version=0)
    ([0, 1, 2, 3], None)
    >>> for ordinal in (1, 2):  # 0 is long: step 1 does not wait for it
    ...     assert window.finish(ordinal, window.in_flight[ordinal].owner, group(ordinal))
    >>> chosen = window.reserve()
    >>> chosen.step, [g.prompt.ordinal for g in chosen.groups]
    (1, [1, 2])
    >>> window.admit(version=0) is None, window.admit(version=1)
    (True, 4)
    >>> tag = window.hand_out(4, Flight(replica=0, incarnation=1, version=1))
    >>> for ordinal in (3, 4):
    ...     assert window.finish(ordinal, window.in_flight[ordinal].owner, group(ordinal))
    >>> window.ready()  # step 2 is the deadline of 0
    False
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field, replace

import msgspec

from hpc_rl.types import PromptGroup

NO_SIGNAL = "no signal: all its answers were scored the same"


Owner = tuple[int, int, str]  # replica, incarnation, tag


@dataclass(frozen=True, slots=True)
class Flight:
    """Who generates a prompt group, from which version on. `tag` tells this hand-out from earlier ones."""

    replica: int
    incarnation: int
    version: int
    tag: str = ""

    @property
    def owner(self) -> Owner:
        return (self.replica, self.incarnation, self.tag)


class Answer(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt that came back: to be trained by step `deadline`, or dropped for `reason`. `group` is what was
    generated (None: nothing). A dropped one that was replaced has no place in a step."""

    ordinal: int
    deadline: int
    group: PromptGroup | None = None
    reason: str = ""
    place: bool = True


@dataclass(frozen=True)
class Chosen:
    """What a step trains, in the order of ordinals, and what was dropped since the step before: reasons by
    ordinal, and what of it was generated (it counts in the means of rewards and lengths)."""

    step: int
    groups: list[PromptGroup]
    drops: dict[int, str]
    dropped_groups: list[PromptGroup]
    refilled: int = 0  # dropped groups that another prompt was started for
    answers: list[Answer] = field(default_factory=list)  # all of the above, as they came
    cancelled: list[Flight] = field(default_factory=list)  # what need not be finished (`oversample.py`)
    again: int = 0  # prompts handed out again for that


@dataclass
class PromptWindow:
    """The state of all prompts that are handed out and not trained yet.

    `total_prompts` None: no end of them, until `total_steps` are full. `max_refill` bounds, per step, how
    many dropped groups are replaced by further prompts (in steps' worth); a drop beyond it takes a place in
    its step, which is smaller then.
    """

    prompts_per_step: int
    max_staleness: int
    total_prompts: int | None
    total_steps: int = 0  # 0: as many as `total_prompts` make
    max_refill: float = 0.0
    steps_taken: int = 0
    next_ordinal: int = 0
    in_flight: dict[int, Flight] = field(default_factory=dict)
    done: dict[int, Answer] = field(default_factory=dict)  # each has a place in a step
    vacated: dict[int, Answer] = field(default_factory=dict)  # dropped and replaced: no place
    ahead: Chosen | None = None  # reserved and not trained yet: belongs to the checkpoint of the step before
    refilled: int = 0  # since the last step
    kept: set[int] = field(default_factory=set)  # were cancelled once (`oversample.py`), not trained yet
    _returned: list[int] = field(default_factory=list)
    _outstanding: Counter[int] = field(default_factory=Counter)  # deadline -> in flight or done
    _finished: Counter[int] = field(default_factory=Counter)  # deadline -> done
    _hand_outs: int = 0

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1 or self.max_staleness < 0:
            raise ValueError(
                f"prompts_per_step must be >= 1 and max_staleness >= 0, not "
                f"{self.prompts_per_step} and {self.max_staleness}"
            )
        if not self.total_steps:
            assert self.total_prompts is not None, "neither prompts nor steps have an end"
            self.total_steps = -(-self.total_prompts // self.prompts_per_step)

    # --- handing out ------------------------------------------------------------------------------
    def admit(self, version: int) -> int | None:
        """The next ordinal that a replica at `version` may start, or None. Changes nothing. What a version
        may start, every newer one may."""
        ordinal = self._next()
        return ordinal if ordinal is not None and self._fits(ordinal, version) else None

    def _next(self) -> int | None:
        if self._returned:
            return self._returned[0]
        if self.exhausted or self.places >= self.prompts_per_step * (self.total_steps - self.steps_taken):
            return None
        return self.next_ordinal

    def _fits(self, ordinal: int, version: int) -> bool:
        deadline = version + self.max_staleness + 1
        count = 1
        for d in sorted({*self._outstanding, deadline}):
            count += self._outstanding.get(d, 0)
            if d >= deadline and count > self.prompts_per_step * (d - self.steps_taken):
                return False
        return True

    def hand_out(self, ordinal: int, flight: Flight) -> str:
        """Record that `ordinal`, just admitted, went to a replica; the tag its answer must have."""
        if self._returned and self._returned[0] == ordinal:
            heapq.heappop(self._returned)
        else:
            assert ordinal == self.next_ordinal, (ordinal, self.next_ordinal)
            self.next_ordinal += 1
        self._hand_outs += 1
        tag = str(self._hand_outs)
        self.in_flight[ordinal] = replace(flight, tag=tag)
        self._outstanding[self._deadline(flight)] += 1
        return tag

    def _deadline(self, flight: Flight) -> int:
        return flight.version + self.max_staleness + 1

    # --- coming back ------------------------------------------------------------------------------
    def finish(self, ordinal: int, owner: Owner, group: PromptGroup) -> bool:
        """A group came back. False (and ignored) if it was meanwhile given to another replica."""
        return self._settle(ordinal, owner, group, "")

    def drop(self, ordinal: int, owner: Owner, reason: str, group: PromptGroup | None = None) -> bool:
        """A prompt could not be generated or scored, or teaches nothing: it is counted and not trained."""
        return self._settle(ordinal, owner, group, reason)

    def _settle(self, ordinal: int, owner: Owner, group: PromptGroup | None, reason: str) -> bool:
        flight = self.in_flight.get(ordinal)
        if flight is None or flight.owner != owner:
            return False
        del self.in_flight[ordinal]
        deadline = self._deadline(flight)
        if reason and self.refilled < int(self.max_refill * self.prompts_per_step):
            self.refilled += 1
            self.vacated[ordinal] = Answer(ordinal, deadline, group, reason, place=False)
            self._leave(deadline)
        else:
            self.done[ordinal] = Answer(ordinal, deadline, group, reason)
            self._finished[deadline] += 1
        return True

    def _leave(self, deadline: int) -> None:
        self._outstanding[deadline] -= 1
        if not self._outstanding[deadline]:
            del self._outstanding[deadline]

    def give_back(self, replica: int) -> list[int]:
        """The replica is lost: its prompts are handed out again, before all others."""
        lost = sorted(ordinal for ordinal, flight in self.in_flight.items() if flight.replica == replica)
        for ordinal in lost:
            self._leave(self._deadline(self.in_flight.pop(ordinal)))
            heapq.heappush(self._returned, ordinal)
        return lost

    # --- steps ------------------------------------------------------------------------------------
    @property
    def places(self) -> int:
        """Prompts that will be part of a step that is not taken yet (or hold a place in one as drops)."""
        return len(self.in_flight) + len(self.done) + len(self._returned)

    @property
    def exhausted(self) -> bool:
        """No prompt is left that was never handed out."""
        return self.total_prompts is not None and self.next_ordinal >= self.total_prompts

    @property
    def over(self) -> bool:
        """No further step will come."""
        nothing_left = self.exhausted and not (self.places or self.vacated)
        return self.steps_taken >= self.total_steps or nothing_left

    def ready(self) -> bool:
        """Whether the next step can be taken."""
        if self.ahead is not None or self.over:
            return False
        if len(self.done) < self.prompts_per_step:
            return self.exhausted and not self.in_flight and not self._returned
        return self._feasible()

    def _feasible(self) -> bool:
        """What stays when the B earliest are taken can be trained in time."""
        step, size = self.steps_taken + 1, self.prompts_per_step
        count = finished = 0
        for d in sorted(self._outstanding):
            count += self._outstanding[d]
            finished += self._finished[d]
            if count - min(size, finished) > size * (d - step):
                return False
        return True

    def _choice(self) -> list[Answer]:
        """The answers of the next step, of all that are done."""
        by_deadline = sorted(self.done.values(), key=lambda answer: (answer.deadline, answer.ordinal))
        return by_deadline[: self.prompts_per_step]

    def reserve(self) -> Chosen:
        """Take the next step. Until `commit` it belongs to what a checkpoint keeps."""
        assert self.ready(), f"step {self.steps_taken + 1} waits for prompts {sorted(self.in_flight)[:8]}"
        step, taken = self.steps_taken + 1, self._choice()
        late = [answer.ordinal for answer in taken if answer.deadline < step]
        assert not late, f"prompts {late} are older than max_staleness at step {step}"
        for answer in taken:
            del self.done[answer.ordinal]
            self._finished[answer.deadline] -= 1
            self._leave(answer.deadline)
        everything = sorted([*taken, *self.vacated.values()], key=lambda answer: answer.ordinal)
        self.ahead = Chosen(
            step,
            [a.group for a in everything if a.group is not None and not a.reason],
            {a.ordinal: a.reason for a in everything if a.reason},
            [a.group for a in everything if a.group is not None and a.reason],
            self.refilled,
            everything,
        )
        self.vacated, self.refilled, self.steps_taken = {}, 0, step
        return self.ahead

    def commit(self) -> None:
        """The reserved step was sent to the policy."""
        self.ahead = None

    # --- checkpoints ------------------------------------------------------------------------------
    def answers(self) -> list[Answer]:
        """All that came back and is not trained, for a checkpoint of the step before the reserved one."""
        ahead = self.ahead.answers if self.ahead is not None else []
        return sorted([*ahead, *self.done.values(), *self.vacated.values()], key=lambda a: a.ordinal)

    def again(self) -> list[int]:
        """Ordinals that a restore hands out again."""
        return sorted([*self.in_flight, *self._returned])

    def restore(self, steps_done: int, answers: list[Answer], next_ordinal: int, again: list[int]) -> None:
        """Begin after `steps_done` steps with what a checkpoint kept."""
        self.steps_taken, self.next_ordinal = steps_done, next_ordinal
        self.in_flight, self.ahead = {}, None
        self.done = {answer.ordinal: answer for answer in answers if answer.place}
        self.vacated = {answer.ordinal: answer for answer in answers if not answer.place}
        self.refilled = len(self.vacated)
        self._finished = Counter(answer.deadline for answer in self.done.values())
        self._outstanding = Counter(self._finished)
        self._returned = sorted(again)


class StrictWindow(PromptWindow):
    """Trains in the order of ordinals: step s waits for the first B that are left, however long one takes.

    The order is then a function of the seed alone. A prompt with r places before it is trained at step
    t + r//B + 1 (earlier where one of those is dropped and replaced), so a replica at version v may start it
    if t + r//B - v <= S. Prompts of lost replicas keep their places.
    """

    def _fits(self, ordinal: int, version: int) -> bool:
        before = self.places
        if self._returned:
            before = sum(o < ordinal for o in (*self.in_flight, *self.done))
        return self.steps_taken + before // self.prompts_per_step - version <= self.max_staleness

    def _feasible(self) -> bool:
        waiting = min((*self.in_flight, *self._returned), default=self.next_ordinal)
        return sum(ordinal < waiting for ordinal in self.done) >= self.prompts_per_step

    def _choice(self) -> list[Answer]:
        return [self.done[ordinal] for ordinal in sorted(self.done)[: self.prompts_per_step]]


ORDERS = {"deadline": PromptWindow, "strict": StrictWindow}
