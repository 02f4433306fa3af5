"""A replica's way to the groups that serve models: scores of reward models, log-probs of the teacher.

A request goes to the process with the fewest of ours under way. It has until TAKE_UP_S to be begun, and from
then on the limit of its group. One whose process is lost, or too slow, is asked of another process once; then
it has failed, which costs that sample. Answers come on a stream of their own (`bus.messages.answers`): the
replica's inbox is read no further while it has all prompts that it may have, and those wait for answers.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpc_rl.bus import messages as m
from hpc_rl.bus.client import Bus, Inbox

LOG = logging.getLogger("hpc_rl.rollout")
POLL_S = 1.0
# Loading a model, and once more after a loss; the controller gives up on a group that does not come.
LIVE_LIMIT_S = 2400.0
TAKE_UP_S = 900.0
# The controller ends a process that is too long in a batch; its word is better than our clock.
MARGIN_S = 15.0
ATTEMPTS = 2

Process = tuple[int, int]  # index, incarnation
Answer = m.AnswerScored | m.TokensScored


class ScoringFailed(RuntimeError):
    """There is no answer to a request; the message names who was asked."""


class _Lost(RuntimeError):
    """The process that was asked will not answer."""


@dataclass
class _Request:
    """One that is under way. `timer` is its deadline, which moves when it is begun."""

    role: str
    process: Process
    answer: asyncio.Future[Answer]
    timer: asyncio.Timeout
    begun: bool = False


class ScoringClient:
    """`limits`: seconds that a group may take for a request once it has begun. Use from one event loop."""

    def __init__(
        self,
        bus: Bus,
        replica: int,
        incarnation: int,
        limits: Mapping[str, float],
        *,
        live_limit_s: float = LIVE_LIMIT_S,
        take_up_s: float = TAKE_UP_S,
        margin_s: float = MARGIN_S,
    ) -> None:
        self._bus = bus
        self._stream = m.answers(replica, incarnation)
        self._limits = {role: limit + margin_s for role, limit in limits.items()}
        self._live_limit_s, self._take_up_s = live_limit_s, take_up_s
        self._live: dict[str, set[Process]] = {}
        self._changed = asyncio.Condition()
        self._requests: dict[int, _Request] = {}
        self._numbers = itertools.count(1)
        self._reader: asyncio.Task[None] | None = None
        self.retries = 0

    @property
    def roles(self) -> frozenset[str]:
        """The groups that there are."""
        return frozenset(self._limits)

    def start(self) -> None:
        """Begin to read answers. Without a group there is nothing to read."""
        if self._limits:
            self._reader = asyncio.create_task(self._read(), name="answers")

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def ask(self, role: str, make: Callable[[int, str], m.Message]) -> Answer:
        """The answer of `role` to `make(number, stream for the answer)`. Raises ScoringFailed."""
        cause = ""
        avoid: int | None = None
        for attempt in range(ATTEMPTS):
            process = await self._choose(role, avoid)
            try:
                return await self._ask(role, process, make)
            except _Lost as error:
                cause, avoid = str(error), process[0]
                self.retries += attempt + 1 < ATTEMPTS
        raise ScoringFailed(cause)

    async def _choose(self, role: str, avoid: int | None) -> Process:
        """The live process with the fewest of our requests, another than `avoid` if there is one."""
        try:
            async with asyncio.timeout(self._live_limit_s), self._changed:
                await self._changed.wait_for(lambda: self._died() or self._live.get(role))
        except TimeoutError as error:
            raise ScoringFailed(f"no process of the {role} group in {self._live_limit_s:g} s") from error
        self._raise_if_died()
        loads = dict.fromkeys(self._live[role], 0)
        for request in self._requests.values():
            if request.role == role and request.process in loads:
                loads[request.process] += 1
        return min(loads, key=lambda process: (process[0] == avoid, loads[process], process))

    async def _ask(self, role: str, process: Process, make: Callable[[int, str], m.Message]) -> Answer:
        number = next(self._numbers)
        try:
            async with asyncio.timeout(self._take_up_s) as timer:
                answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
                request = self._requests[number] = _Request(role, process, answer, timer)
                message = make(number, self._stream)
                await asyncio.to_thread(self._bus.send, m.inbox(role, process[0]), message)
                return await answer
        except TimeoutError as error:
            limit = self._limits[role] if request.begun else self._take_up_s
            what = "did not answer" if request.begun else "did not begin"
            raise _Lost(f"{role} {process[0]} {what} within {limit:g} s") from error
        finally:
            del self._requests[number]

    # --- answers -----------------------------------------------------------------------------------
    async def _read(self) -> None:
        inbox = Inbox(self._bus, self._stream)
        try:
            while True:
                for message in await asyncio.to_thread(inbox.poll, POLL_S):
                    await self._take(message)
        finally:
            async with self._changed:
                self._changed.notify_all()
            for request in self._requests.values():
                if not request.answer.done():
                    request.answer.set_exception(_Lost("the replica reads no answers any more"))

    def _died(self) -> bool:
        return self._reader is None or self._reader.done()

    def _raise_if_died(self) -> None:
        if self._died():
            raise ScoringFailed("the replica reads no answers any more")

    async def _take(self, message: m.Message) -> None:
        match message:
            case m.ScoringMembers():
                await self._members(message)
            case m.ScoringBegan():
                now = asyncio.get_running_loop().time()
                for number in message.numbers:
                    request = self._requests.get(number)
                    if request is not None and not request.begun and not request.timer.expired():
                        request.begun = True
                        request.timer.reschedule(now + self._limits[request.role])
            case m.AnswerScored() | m.TokensScored():
                request = self._requests.get(message.number)  # None: it came too late
                if request is not None and not request.answer.done():
                    request.answer.set_result(message)
            case _:
                LOG.warning("no use for %s among the answers", type(message).__name__)

    async def _members(self, message: m.ScoringMembers) -> None:
        """Who serves has changed: what was asked of others is asked anew."""
        live = {(index, incarnation) for index, incarnation in message.live}
        for request in self._requests.values():
            gone = request.role == message.role and request.process not in live
            if gone and not request.answer.done():
                request.answer.set_exception(_Lost(f"{request.role} {request.process[0]} was lost"))
        async with self._changed:
            self._live[message.role] = live
            self._changed.notify_all()
