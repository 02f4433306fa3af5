"""A reward that is a function of an installed module or of a plugin file, named `module:function`."""

from __future__ import annotations

import importlib
from typing import Any

from hpc_rl.rewards.base import RewardError, SampleInfo, Value, with_sample
from hpc_rl.rewards.config import PythonConfig


class Python:
    """Reward `python`. The function has the signature of `Reward.score`, and may be async."""

    def __init__(self, config: PythonConfig) -> None:
        name, _, attribute = config.function.partition(":")
        function: Any = getattr(importlib.import_module(name), attribute, None)
        if not callable(function):
            raise RewardError(f"reward python: module {name} has no function {attribute!r}")
        self._function = with_sample(function)

    def score(
        self,
        prompt: str,
        response: str,
        answer: str | None,
        fields: dict[str, Any],
        sample: SampleInfo | None = None,
    ) -> Value:
        return self._function(prompt, response, answer, fields, sample)
