"""What every simulator promises, whatever its actions are: the shipped one, and a foreign one with arrays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hpc_rl.recipe.extensions import register, registry
from hpc_rl.simulators.base import Simulator, SimulatorError, SimulatorSettings, Task, Turn, make_simulator

pytestmark = pytest.mark.timeout(120)
HERE = "tests.simulators.point"
register("simulators", "point", implementation=f"{HERE}:Point", config=f"{HERE}:PointConfig")
SLOTS = 3


def call(expression: str) -> Turn:
    return Turn(
        f'<tool_call>{{"name": "calculator", "arguments": {{"expression": "{expression}"}}}}</tool_call>'
    )


@dataclass(frozen=True)
class Member:
    options: dict[str, Any]
    act: Callable[[int, int], Any]  # (episode, step) -> an action
    steps: int  # after so many the episode is not over yet
    last: Any  # an action that ends it


MEMBERS = {
    "tools": Member({"tools": ["calculator"]}, lambda which, step: call(f"{which}*10+{step}"), 3, Turn("42")),
    "point": Member(
        {"max_steps": 4}, lambda which, step: np.full((2, 2), 0.01 * (which + step)), 3, np.zeros((2, 2))
    ),
}


def play(name: str, body: Callable[[Simulator, Member], Any]) -> Any:
    member = MEMBERS[name]

    async def run() -> Any:
        config = registry("simulators").config(name, member.options)
        simulator = make_simulator(name, SimulatorSettings(config, SLOTS, workers=2))
        try:
            await simulator.start()
            return await body(simulator, member)
        finally:
            await simulator.close()
            await simulator.close()  # once more is no error

    return asyncio.run(run())


async def episode(simulator: Simulator, member: Member, slot: int, which: int) -> list[Any]:
    """Observations, rewards and ends of one episode; what took time is left out."""
    (first,) = await simulator.reset([slot], [Task(row=which)], [100 + which])
    seen: list[Any] = [first]
    for step in range(member.steps):
        (result,) = await simulator.step([slot], [member.act(which, step)])
        seen.append((result.observation, result.reward, result.done))
    (result,) = await simulator.step([slot], [member.last])
    return [*seen, (result.observation, result.reward, result.done)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("name", MEMBERS)
def test_an_episode_follows_from_task_seed_and_actions_whatever_the_others_do(name: str) -> None:
    async def body(simulator: Simulator, member: Member) -> None:
        assert simulator.slots == SLOTS
        assert simulator.kind in ("text", "arrays")
        alone = [await episode(simulator, member, 0, which) for which in range(SLOTS)]
        again = await episode(simulator, member, 2, 0)  # another slot, after other episodes
        at_once = await asyncio.gather(*(episode(simulator, member, which, which) for which in range(SLOTS)))
        assert same(again, alone[0])
        assert same(list(at_once), alone)
        assert not same(alone[0], alone[1])
        assert [result[2] for result in alone[0][1:]] == [False] * member.steps + [True]

    play(name, body)


@pytest.mark.parametrize("name", MEMBERS)
def test_slots_of_one_call_go_by_its_order(name: str) -> None:
    async def body(simulator: Simulator, member: Member) -> None:
        order = [2, 0, 1]
        tasks = [Task(row=which) for which in order]
        first = await simulator.reset(order, tasks, [100 + which for which in order])
        results = await simulator.step(order, [member.act(which, 0) for which in order])
        for place, which in enumerate(order):
            expected = await episode(simulator, member, which, which)
            assert same(first[place], expected[0])
            assert same((results[place].observation, results[place].reward, results[place].done), expected[1])

    play(name, body)


@pytest.mark.parametrize("name", MEMBERS)
def test_only_episodes_under_way_are_stepped_and_reset_begins_anew(name: str) -> None:
    async def body(simulator: Simulator, member: Member) -> None:
        with pytest.raises(SimulatorError, match="no episode under way"):
            await simulator.step([0], [member.act(0, 0)])
        with pytest.raises(SimulatorError, match="there is no slot 3"):
            await simulator.reset([SLOTS], [Task(row=0)], [0])
        await simulator.reset([0], [Task(row=1)], [101])
        await simulator.step([0], [member.act(1, 0)])
        whole = await episode(simulator, member, 0, 1)
        assert same(whole, await episode(simulator, member, 1, 1))
        with pytest.raises(SimulatorError, match="slot 0 has no episode under way"):
            await simulator.step([0], [member.act(0, 0)])

    play(name, body)
