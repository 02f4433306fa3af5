"""Names of `cosmos_rl` that launch scripts import, where cosmos-rl itself is not installed.

`install` adds a finder behind all others: an import of `cosmos_rl.anything` gives a module that has just
the names below, wherever cosmos-rl keeps them. What else a script imports is an ImportError that says so.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.launch.script import THEIRS, ScriptError, launch_worker


class Config:
    """Stands in annotations; scripts are given an object with the names that they read."""


class RLPayload:
    """An item with `prompt` or `conversation`, and `reference_answer`."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class ChatMessage:
    """A message of a conversation."""

    def __init__(self, role: str, content: Any) -> None:
        self.role, self.content = role, content


class DataPacker:
    """The base of a script's packers. Only `get_rollout_input` is ever called."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.config: Any = None
        self.tokenizer: Any = None

    def setup(self, config: Any, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer

    def get_rollout_input(self, item: Any) -> Any:
        """The item as it is: the replica applies the chat template."""
        return item

    def get_policy_input(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("the policy trains on just the tokens that were sampled")


def _own(name: str, **options: Any) -> Callable[..., float]:
    """A reward of ours as a function of cosmos-rl's signature."""

    def score(to_be_evaluated: str, reference: Any = None, *_: Any, **__: Any) -> float:
        members = registry("rewards")
        reward = members.load(name)(members.config(name, options))
        return float(reward.score("", to_be_evaluated, reference, {}))

    score.__name__ = f"{name}_reward_fn"
    return score


def _refuse(what: str) -> Callable[..., float]:
    def score(*_: Any, **__: Any) -> float:
        raise ScriptError(f"{what} is a reward of the recipe: reward: [{{name: overlong, buffer: N}}]")

    return score


NAMES: dict[str, Any] = {
    "main": launch_worker,
    "launch_worker": launch_worker,
    "Config": Config,
    "RLPayload": RLPayload,
    "ChatMessage": ChatMessage,
    "DataPacker": DataPacker,
    "BaseDataPacker": DataPacker,
    "DecoderOnlyLLMDataPacker": DataPacker,
    "logger": logging.getLogger(THEIRS),
    "direct_math_reward_fn": _own("math"),
    "boxed_math_reward_fn": _own("math", boxed=True),
    "gsm8k_reward_fn": _own("gsm8k"),
    "single_choice_reward_fn": _own("single_choice"),
    "format_reward_fn": _own("format", style="think_answer"),
    "overlong_reward_fn": _refuse("overlong"),
}


class _StandIn(ModuleType):
    """A module of cosmos-rl's with the names of the table."""

    def __getattr__(self, name: str) -> Any:
        if name in NAMES:
            return NAMES[name]
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            f"{self.__name__}.{name} is not in hpc-rl; launch scripts find there: {', '.join(sorted(NAMES))}"
        )


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != THEIRS:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return None


_FINDER = _Finder()


def install() -> None:
    """Raises ScriptError where cosmos-rl itself is installed: its `launch_worker` would start its workers."""
    if _FINDER in sys.meta_path:
        return
    if PathFinder.find_spec(THEIRS) is not None:
        raise ScriptError(
            "cosmos_rl itself is installed here, and its launch_worker would start its own workers: import "
            "launch_worker from hpc_rl.recipe.launch in the script"
        )
    sys.meta_path.append(_FINDER)
