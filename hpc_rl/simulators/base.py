"""What an environment is: numbered slots behind one protocol, whether actions are texts or motor commands.

A slot plays one episode at a time: `reset` begins it, each `step` takes one action of the policy (a turn's
text, or a chunk of motor commands) and gives the next observation. An episode follows from its task, its seed
and its actions alone; nothing outlives it. A run that is resumed therefore needs no state of an environment:
the controller's cursor over the rows says which episodes come next.

Every member, shipped or foreign, passes `tests/simulators/test_contract.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.schema import Recipe


class SimulatorError(RuntimeError):
    """An environment is lost, or was asked what it cannot do. It costs the prompt whose episode it was."""


@dataclass(frozen=True)
class SimulatorSettings:
    """Everything a simulator is made from. `config` is its own pydantic config; `workers` is how many
    processes it may use; `plugins` and `code` are the run's own modules, for processes that import them."""

    config: Any
    slots: int
    workers: int = 1
    plugins: tuple[str, ...] = ()
    code: str = ""


@dataclass(frozen=True)
class Task:
    """What an episode is about: a row of the data (`types.Prompt`)."""

    row: int
    content: str | list[dict[str, Any]] = ""
    answer: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """The action of a `text` environment: what the policy wrote in one turn.

    `text` has the special tokens but not the one that ended the turn; `finish` is `stop` or `length`.
    """

    text: str
    finish: str = "stop"


@dataclass(frozen=True)
class Result:
    """What an action led to.

    `observation` of a `text` environment is a list of chat messages to add before the next turn; of an
    `arrays` environment a mapping of names to NumPy arrays. With `done` the episode is over, and what it
    shows is the last one. `info` are numbers to be added up over the episode and reported.
    """

    observation: Any
    reward: float = 0.0
    done: bool = False
    info: Mapping[str, float] = field(default_factory=dict)


class Simulator(Protocol):
    """Environments in `slots` numbered places. Lists go by the order of the given slots.

    All methods are called from one event loop. Calls for different slots may be under way at once; a slot
    has one call at a time. A vectorised environment steps all slots of a call together.
    """

    kind: Literal["text", "arrays"]
    slots: int

    async def start(self) -> None:
        """Start what is needed. Raises SimulatorError, with the reason, where it cannot work."""
        ...

    async def reset(self, slots: Sequence[int], tasks: Sequence[Task], seeds: Sequence[int]) -> list[Any]:
        """Begin episodes (whatever the slots did before) and give the first observations: for `text`,
        messages to add to the prompt (mostly none)."""
        ...

    async def step(self, slots: Sequence[int], actions: Sequence[Any]) -> list[Result]:
        """Raises SimulatorError for a slot that has no episode under way."""
        ...

    async def close(self) -> None:
        """End everything that was started; more than once is no error."""
        ...


class TextSimulator(Simulator, Protocol):
    """An environment that a language model talks to."""

    tools: list[dict[str, Any]]
    """JSON schemas (`{"type": "function", "function": ...}`) for the chat template; known after `start`."""


class Slots:
    """Which slots have an episode under way; what members use to keep the protocol."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._playing: set[int] = set()

    def begin(self, slots: Sequence[int]) -> None:
        """Raises SimulatorError for a slot that does not exist."""
        wrong = [slot for slot in slots if not 0 <= slot < self.count]
        if wrong:
            raise SimulatorError(f"there is no slot {wrong[0]}; there are {self.count}, counted from 0")
        self._playing.update(slots)

    def require(self, slots: Sequence[int]) -> None:
        """Raises SimulatorError for a slot without an episode under way."""
        wrong = [slot for slot in slots if slot not in self._playing]
        if wrong:
            raise SimulatorError(f"slot {wrong[0]} has no episode under way: reset it first")

    def end(self, slot: int) -> None:
        self._playing.discard(slot)


def make_simulator(name: str, settings: SimulatorSettings) -> Simulator:
    """A simulator by its registered name. Raises UnknownExtension."""
    simulator: Simulator = registry("simulators").load(name)(settings)
    return simulator


def simulator_config(recipe: Recipe) -> Any:
    """The validated config of the recipe's simulator; None without one."""
    if recipe.simulator is None:
        return None
    return registry("simulators").config(recipe.simulator["name"], recipe.simulator)
