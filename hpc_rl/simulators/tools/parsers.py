"""Tool calls in what a policy wrote: text in, calls out, without a tokenizer or a request.

`hermes`  `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them (Qwen, Hermes; as
          vLLM's parser of that name, against which a test holds it).
`json`    the whole turn is `{"name": ..., "parameters": {...}}` or a list of such (Llama 3.1).

Thoughts are no calls: only what comes behind the last `</think>` is looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_HERMES = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.S)
_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.S)


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Malformed:
    """Something that was meant as a call; `why` is for the policy to read."""

    why: str


Parsed = list[Call | Malformed]


def outside_thoughts(text: str) -> str:
    """What is said aloud; nothing where a thought never ends."""
    _, closed, said = text.rpartition("</think>")
    if closed:
        return said
    return "" if text.lstrip().startswith("<think>") else text


def hermes(text: str) -> Parsed:
    found = _HERMES.findall(outside_thoughts(text))
    return [_call(closed or rest) for closed, rest in found]


def bare_json(text: str) -> Parsed:
    said = outside_thoughts(text).strip().removeprefix("<|python_tag|>").strip()
    if (fenced := _FENCE.match(said)) is not None:
        said = fenced[1]
    if not said.startswith(("{", "[")):
        return []
    try:
        value = json.loads(said)
    except ValueError as error:
        # A sentence may begin with a bracket; an object with a name was meant as a call.
        return [Malformed(f"the call is not JSON: {error}")] if '"name"' in said else []
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict) and "name" in item for item in items):
        return []  # an answer that is JSON
    return [_checked(item) for item in items]


def _call(text: str) -> Call | Malformed:
    try:
        return _checked(json.loads(text))
    except ValueError as error:
        return Malformed(f"the call is not JSON: {error}")
    except RecursionError:
        return Malformed("the call is nested too deeply")


def _checked(value: Any) -> Call | Malformed:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return Malformed('a call must be a JSON object such as {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in JSON, as OpenAI's interface has it
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return Malformed(f"the arguments of {value['name']!r} are a text and not a JSON object")
    if not isinstance(arguments, dict):
        return Malformed(f"the arguments of {value['name']!r} must be a JSON object")
    return Call(value["name"], arguments)


PARSERS: dict[str, Callable[[str], Parsed]] = {"hermes": hermes, "json": bare_json}
