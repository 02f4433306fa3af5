"""A replica asks the groups that serve models; this test is the controller and the processes of the group."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.bus.client import Bus, Inbox
from hpc_rl.rollout.scoring import ScoringClient, ScoringFailed

pytestmark = [pytest.mark.redis]
numbers = itertools.count(1000)


class Group:
    """Two processes of `teacher`, played by this test, and the client of one replica."""

    def __init__(self, bus: Bus, limit_s: float = 5.0, **limits: float) -> None:
        self.bus, self.replica = bus, next(numbers)
        self.base = 10 * self.replica  # inboxes that no other test has used
        self.client = ScoringClient(bus, self.replica, 2, {"teacher": limit_s}, margin_s=0.0, **limits)
        self.inboxes = {i: Inbox(bus, m.inbox("teacher", self.base + i)) for i in range(2)}

    def live(self, *who: tuple[int, int]) -> None:
        """(0 or 1, incarnation) serve from now on."""
        live = [(self.base + index, incarnation) for index, incarnation in who]
        self.bus.send(m.answers(self.replica, 2), m.ScoringMembers("teacher", live))

    async def got(self, index: int) -> m.ScoreTokens:
        """The next request to process `index`."""
        for _ in range(100):
            for message in await asyncio.to_thread(self.inboxes[index].poll, 0.1, 1):
                assert isinstance(message, m.ScoreTokens)
                return message
        raise AssertionError(f"process {index} was asked nothing")

    def begin(self, request: m.ScoreTokens) -> None:
        self.bus.send(request.reply_to, m.ScoringBegan([request.number]))

    def answer(self, request: m.ScoreTokens, value: float) -> None:
        self.bus.send(request.reply_to, m.TokensScored(request.number, [value]))

    async def ask(self) -> float:
        def make(number: int, stream: str) -> m.Message:
            return m.ScoreTokens(number, stream, [1], [2])

        answer = await self.client.ask("teacher", make)
        assert isinstance(answer, m.TokensScored)
        return answer.log_probs[0]


@pytest.fixture
def bus(bus_file: Path) -> Iterator[Bus]:
    bus = Bus.connect(bus_file, 5.0)
    yield bus
    bus.close()


def play(group: Group, scene: Callable[[Group], Awaitable[None]]) -> None:
    async def run() -> None:
        group.client.start()
        try:
            async with asyncio.timeout(30):
                await scene(group)
        finally:
            await group.client.close()

    asyncio.run(run())


def test_requests_wait_for_a_process_and_go_to_the_least_loaded(bus: Bus) -> None:
    async def scene(group: Group) -> None:
        asked = [asyncio.create_task(group.ask()) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in asked)
        group.live((0, 1), (1, 1))
        requests = [await group.got(index) for index in (0, 1, 0, 1)]
        for value, request in enumerate(requests):
            group.begin(request)
            group.answer(request, float(value))
        assert sorted(await asyncio.gather(*asked)) == [0.0, 1.0, 2.0, 3.0]
        assert group.client.retries == 0

    play(Group(bus), scene)


def test_what_a_lost_process_was_asked_is_asked_elsewhere_and_late_answers_are_nothing(bus: Bus) -> None:
    async def scene(group: Group) -> None:
        group.live((0, 1), (1, 1))
        task = asyncio.create_task(group.ask())
        first = await group.got(0)
        group.begin(first)
        group.live((1, 1))
        second = await group.got(1)
        assert second.number != first.number
        group.answer(first, 1.0)
        group.answer(second, 2.0)
        assert await task == 2.0
        assert group.client.retries == 1

    play(Group(bus), scene)


def test_the_only_process_comes_back_with_another_incarnation(bus: Bus) -> None:
    async def scene(group: Group) -> None:
        group.live((0, 1))
        task = asyncio.create_task(group.ask())
        await group.got(0)
        group.live()
        await asyncio.sleep(0.2)
        assert not task.done()
        group.live((0, 2))
        group.answer(await group.got(0), 3.0)
        assert await task == 3.0

    play(Group(bus), scene)


def test_a_second_loss_is_the_end_of_a_request(bus: Bus) -> None:
    async def scene(group: Group) -> None:
        group.live((0, 1))
        task = asyncio.create_task(group.ask())
        await group.got(0)
        group.live((0, 2))
        await group.got(0)
        group.live((0, 3))
        with pytest.raises(ScoringFailed, match=rf"teacher {group.base} was lost"):
            await task
        group.live((1, 1))  # the next request is not touched by it
        task = asyncio.create_task(group.ask())
        group.answer(await group.got(1), 4.0)
        assert await task == 4.0

    play(Group(bus), scene)


def test_the_deadline_counts_from_the_beginning_and_another_process_is_asked(bus: Bus) -> None:
    async def scene(group: Group) -> None:
        group.live((0, 1), (1, 1))
        task = asyncio.create_task(group.ask())
        first = await group.got(0)
        await asyncio.sleep(0.8)  # longer than the limit, but it waits its turn
        assert not task.done()
        group.begin(first)
        second = await group.got(1)  # not 0 again
        group.begin(second)
        with pytest.raises(ScoringFailed, match=rf"teacher {group.base + 1} did not answer within 0\.4 s"):
            await task

    play(Group(bus, limit_s=0.4), scene)


def test_who_never_begins_and_who_never_comes_are_named(bus: Bus) -> None:
    async def scene(group: Group) -> None:
        with pytest.raises(ScoringFailed, match=r"no process of the teacher group in 0\.3 s"):
            await group.ask()
        group.live((0, 1))
        with pytest.raises(ScoringFailed, match=rf"teacher {group.base} did not begin within 0\.3 s"):
            await group.ask()

    play(Group(bus, take_up_s=0.3, live_limit_s=0.3), scene)
