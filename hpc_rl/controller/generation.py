"""Prompts out, prompt groups in: the part of the loop that keeps the replicas busy.

It joins what may start (`window.py`), who gets it (`dispatch.py`) and the evaluation prompts, which go first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from hpc_rl.bus import messages as m
from hpc_rl.controller.batch import teaches
from hpc_rl.controller.dispatch import Dispatcher
from hpc_rl.controller.evaluation import Evaluator
from hpc_rl.controller.members import AttemptFailed, Members, Replica
from hpc_rl.controller.prompts import PromptSource, prompt_seed
from hpc_rl.controller.window import NO_SIGNAL, Flight, PromptWindow
from hpc_rl.recipe.schema import Recipe
from hpc_rl.simulators.config import credit_of
from hpc_rl.types import Sampling

LOG = logging.getLogger("hpc_rl.controller")
GENERATE_LIMIT_S = 1800.0


class Generation:
    """`send` takes (stream, message) pairs for replicas' inboxes."""

    def __init__(
        self,
        recipe: Recipe,
        algorithm: Any,
        members: Members,
        window: PromptWindow,
        source: PromptSource,
        *,
        send: Callable[[list[tuple[str, m.Message]]], None],
        tell: Callable[..., None],
    ) -> None:
        assert recipe.rollout is not None
        self.window, self.source = window, source
        limit = recipe.rollout.max_in_flight
        self.dispatch = Dispatcher(members, None if limit == "auto" else limit)
        self._recipe, self._algorithm, self._members = recipe, algorithm, members
        self._max_tokens, self._credit = recipe.rollout.max_tokens, credit_of(recipe)
        self._send, self._tell = send, tell
        self._last_answer = time.monotonic()

    # --- out --------------------------------------------------------------------------------------
    def hand_out(self, evaluator: Evaluator) -> None:
        """Give prompts to all replicas that have room for them and may have them. They go out together: an
        exchange with Redis for each would take longer than all else here."""
        out: list[tuple[str, m.Message]] = []
        for replica in self.dispatch.candidates():
            request = evaluator.next_request(replica.index, replica.incarnation)
            if request is None:
                request = self._next(replica)
            if request is None:
                if replica.version == self.dispatch.newest():
                    break  # what its version may not start, none may
                continue
            if self.dispatch.all_idle:
                self._last_answer = time.monotonic()  # the clock of `check` starts now
            self.dispatch.began(replica.index)
            out.append((m.inbox("rollout", replica.index), request))
        self._send(out)

    def _next(self, replica: Replica) -> m.Generate | None:
        assert replica.version is not None
        ordinal = self.window.admit(replica.version)
        if ordinal is None:
            return None
        flight = Flight(replica.index, replica.incarnation, replica.version)
        return self._request(ordinal, self.window.hand_out(ordinal, flight))

    def _request(self, ordinal: int, tag: str) -> m.Generate:
        sampling = Sampling(
            temperature=self._algorithm.temperature,
            top_p=self._algorithm.top_p,
            max_tokens=self._max_tokens,
            seed=prompt_seed(self._recipe.seed, "train", ordinal),
        )
        return m.Generate(self.source.prompt(ordinal), self._algorithm.group_size, sampling, tag=tag)

    # --- back -------------------------------------------------------------------------------------
    def answered(self, message: m.GroupDone | m.GroupFailed) -> None:
        """A replica has one prompt group less, whatever it was for."""
        self._last_answer = time.monotonic()
        if self._members.find(message.replica, message.incarnation) is not None:
            load = message.load if isinstance(message, m.GroupDone) else None
            self.dispatch.ended(message.replica, load, self._algorithm.group_size)

    def done(self, message: m.GroupDone) -> None:
        """A prompt group of the training data came back."""
        ordinal, owner = message.group.prompt.ordinal, (message.replica, message.incarnation, message.tag)
        if self._algorithm.drop_zero_variance and not teaches(message.group, self._credit):
            self.window.drop(ordinal, owner, NO_SIGNAL, message.group)
        else:
            self.window.finish(ordinal, owner, message.group)

    def failed(self, message: m.GroupFailed) -> None:
        owner = (message.replica, message.incarnation, message.tag)
        if self.window.drop(message.ordinal, owner, message.cause):
            LOG.warning("prompt %d dropped: %s", message.ordinal, message.cause)
            self._tell("prompt_dropped", ordinal=message.ordinal, reason=message.cause)

    def lost(self, replica: Replica, evaluator: Evaluator) -> None:
        """Its prompts are handed out again."""
        self.dispatch.lost(replica.index)
        again = self.window.give_back(replica.index)
        evaluator.give_back(replica.index)
        LOG.warning("%s: %d prompts are handed out again", replica.name, len(again))

    def check(self) -> None:
        """Prompts in flight that never come back end the attempt, with the replicas named."""
        if time.monotonic() - self._last_answer < GENERATE_LIMIT_S:
            return
        waiting = {index: load for index, load in self.dispatch.loads.items() if load}
        if waiting:
            who = ", ".join(f"rollout {index}" for index in sorted(waiting))
            raise AttemptFailed(
                f"no answer for {GENERATE_LIMIT_S:.0f} s from {who} ({sum(waiting.values())} prompts)"
            )

    def metrics(self) -> dict[str, float]:
        """Queues and idle time since the last step."""
        return {
            **self.dispatch.metrics(),
            "rollout/in_flight": float(len(self.window.in_flight)),
            "rollout/done_waiting": float(len(self.window.done)),
        }
