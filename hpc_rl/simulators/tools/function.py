"""A tool that is a Python function of the user's, sync or async, named `module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from hpc_rl.simulators.config import FunctionConfig, tool_name
from hpc_rl.simulators.tools.base import ToolError, function_schema


class Function:
    """See `Tool`. The schema is that of the function's type hints, which the arguments are checked by."""

    def __init__(self, config: FunctionConfig) -> None:
        module, _, attribute = config.function.partition(":")
        function: Any = getattr(importlib.import_module(module), attribute, None)
        if not callable(function):
            raise ImportError(f"tool function: module {module} has no function {attribute!r}")
        self._function = function
        self._arguments = _arguments_of(function)
        described = config.description or (inspect.getdoc(function) or "").split("\n\n")[0]
        name = tool_name({"name": "function", **config.model_dump()})
        found = self._arguments.model_json_schema()
        properties = {key: _without_title(value) for key, value in found.get("properties", {}).items()}
        self.schema = function_schema(
            name, " ".join(described.split()), properties, found.get("required", [])
        )

    def call(self, arguments: dict[str, Any]) -> str | Awaitable[str]:
        try:
            checked = self._arguments.model_validate(arguments)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ToolError(f"argument {where!r}: {first['msg']}") from error
        given = {key: getattr(checked, key) for key in checked.model_fields_set}
        value = self._function(**given)
        return value if isinstance(value, Awaitable) else str(value)


def _arguments_of(function: Any) -> type[BaseModel]:
    hints = get_type_hints(function)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ImportError(f"tool function: parameter {parameter} has no name to be given by")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
    return create_model("Arguments", __config__=ConfigDict(extra="forbid"), **fields)


def _without_title(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "title"}
