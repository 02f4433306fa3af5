"""Whether a model's chat template can carry episodes of several turns, before the queue."""

from __future__ import annotations

from pathlib import Path

from hpc_rl.recipe.schema import Recipe


def check_template(recipe: Recipe, words: Path) -> None:
    """`words` is the folder with the chat template. Raises DataError."""
    from hpc_rl.data.errors import DataError
    from hpc_rl.data.observations import Observations
    from hpc_rl.data.templates import ChatTemplate
    from hpc_rl.simulators.base import simulator_config
    from hpc_rl.simulators.config import ToolsConfig, tool_name
    from hpc_rl.simulators.tools.base import function_schema

    config = simulator_config(recipe)
    template = ChatTemplate.read(words)
    if template is None:
        raise DataError(
            f"episodes of several turns (simulator) need a chat template, and {words} has none; set "
            "model.tokenizer to a folder or name that has one"
        )
    names = [tool_name(section) for section in config.tools] if isinstance(config, ToolsConfig) else []
    Observations(template, [function_schema(name, "", {}) for name in names])
