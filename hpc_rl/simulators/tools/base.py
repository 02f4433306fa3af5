"""What a tool is. Tools run in host processes only (`host.py`), never in the engine's."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

from hpc_rl.recipe.extensions import registry


class ToolError(Exception):
    """A call cannot be answered; the text is what the policy is told."""


class Tool(Protocol):
    schema: dict[str, Any]
    """`{"type": "function", "function": {"name", "description", "parameters"}}`, for the chat template."""

    def call(self, arguments: dict[str, Any]) -> str | Awaitable[str]:
        """What the policy is told. Any exception is an error that it is told of as well."""
        ...


def function_schema(
    name: str, description: str, properties: Mapping[str, Any], required: list[str] | None = None
) -> dict[str, Any]:
    """The JSON schema of a function; all properties are required unless said otherwise."""
    parameters = {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties) if required is None else required,
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def make_tool(section: dict[str, Any]) -> Tool:
    """The tool of one item of the recipe's list. Raises UnknownExtension, RecipeError or ImportError."""
    members = registry("tools")
    tool: Tool = members.load(section["name"])(members.config(section["name"], section))
    return tool
