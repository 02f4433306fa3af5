"""What a recipe may say under `simulator:`. No torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.schema import Positive, Recipe, Section


class TextConfig(Section):
    """Of every environment that a language model talks to.

    `rollout.max_tokens` bounds a whole trajectory, observations included; `max_turn_tokens` what the policy
    writes in one turn. `credit` is what an advantage is of (docs/tools.md): the trajectory, or each turn.
    """

    max_turns: Positive = 5
    max_turn_tokens: Positive | None = None
    credit: Literal["trajectory", "turn"] = "trajectory"

    @property
    def rewarded(self) -> bool:
        """Whether the environment itself gives rewards."""
        return True


def credit_of(recipe: Recipe) -> str:
    """What the advantages of a recipe are of: `trajectory` or `turn`."""
    return str((recipe.simulator or {}).get("credit", "trajectory"))


class ToolConfig(Section):
    """Of every tool. `limit_s` is how long one call may take."""

    limit_s: float = Field(default=10.0, gt=0, le=3600)
    beyond_s: ClassVar[float] = 0.0  # for tools that end by themselves at limit_s, and should get to it


class CalculatorConfig(ToolConfig):
    """Arithmetic, evaluated without running any code."""


class PythonToolConfig(ToolConfig):
    """Python code in a confined process of its own per call."""

    beyond_s: ClassVar[float] = 10.0
    memory_mb: int = Field(default=512, ge=64, le=1 << 20)
    output_kb: int = Field(default=256, ge=1, le=1 << 20)


class FunctionConfig(ToolConfig):
    """`function` is `module:function`: an installed module, or a file listed under `plugins`. It is called by
    its own name, described by the first paragraph of its docstring."""

    function: str
    called: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,63}$")] | None = None
    description: str | None = None

    @field_validator("function")
    @classmethod
    def _reference(cls, value: str) -> str:
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value) is None:
            raise ValueError("must look like module:function")
        return value


def _tool(value: object) -> object:
    """A tool's name, or a mapping with its name and its options, which are validated by its own config."""
    from hpc_rl.recipe.extensions import UnknownExtension
    from hpc_rl.recipe.yaml_source import RecipeError

    section = {"name": value} if isinstance(value, str) else value
    if not isinstance(section, dict) or not isinstance(section.get("name"), str):
        raise ValueError("must be the name of a tool, or a mapping with its `name` and its options")
    name = section["name"]
    try:
        config = registry("tools").config(name, section)
    except UnknownExtension as error:
        raise ValueError(str(error)) from error
    except RecipeError as error:
        raise ValueError("; ".join(f"{p.key}: {p.message}" for p in error.problems)) from error
    return {"name": name, **config.model_dump(mode="json")}


Tool = Annotated[dict[str, Any], BeforeValidator(_tool)]


def tool_name(section: dict[str, Any]) -> str:
    """What the policy calls a tool by."""
    if section["name"] != "function":
        return str(section["name"])
    return str(section.get("called") or section["function"].rpartition(":")[2])


class ToolsConfig(TextConfig):
    """Tools that the policy may call between its turns (docs/tools.md).

    `max_calls` in one turn; an observation is cut at `max_chars`. `call_reward` is what a turn earns whose
    calls all succeed, `error_reward` one with a call that fails. `memory_gb` is for a process of tools.
    """

    tools: Annotated[list[Tool], Field(min_length=1)]
    parser: Literal["hermes", "json"] = "hermes"
    max_calls: Positive = 4
    max_chars: Positive = 4000
    call_reward: float = 0.0
    error_reward: float = 0.0
    memory_gb: float = Field(default=4.0, gt=0)

    @property
    def rewarded(self) -> bool:
        return self.call_reward != 0 or self.error_reward != 0

    @field_validator("tools")
    @classmethod
    def _called_differently(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [tool_name(section) for section in value]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two tools are called {min(twice)!r}; give one another name (`called`)")
        return value
