"""A recipe as a person would write it: the order of the schema, no defaults, short sections on one line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from hpc_rl.recipe.cosmos.draft import Assumed, Entry
from hpc_rl.recipe.dump import flow_yaml
from hpc_rl.recipe.messages import is_secret, keys_at, show
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import KeyPath

WIDTH = 110
_SHORT = 8  # leaves of a section that is written on one line


def recipe_text(recipe: dict[str, Any], header: Iterable[str]) -> str:
    """The recipe with `header` as comments above it."""
    lines = [line for text in header for line in comment(text)]
    return "\n".join([*lines, *_lines(recipe, ())]) + "\n"


def comment(text: str) -> list[str]:
    """`text` as comment lines; what is indented stays so, and nothing in it can end the comment."""
    safe = "".join(char if char.isprintable() else "?" for char in text)
    indent = " " * (len(safe) - len(safe.lstrip()))
    wrapped = textwrap.wrap(
        safe.strip(),
        WIDTH - 2,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )
    return [f"# {line}" for line in wrapped] or ["#"]


def report(
    entries: Iterable[Entry], assumed: Iterable[Assumed], notes: Iterable[str], *, mapped: bool
) -> list[str]:
    """What became of the keys, in words. `mapped`: also those that only have another name."""
    found = list(entries)
    lines: list[str] = []

    def part(title: str, texts: list[str]) -> None:
        lines.extend([title, *(f"  {text}" for text in texts)] if texts else [])

    plain = [entry for entry in found if entry.fate == "mapped"]
    part(
        "Mapped:" if mapped else "Changed in meaning:",
        [_mapped(e) for e in plain if mapped or (e.note and e.to)],
    )
    part("Not in the file, so cosmos-rl's defaults:", [_assumed(item) for item in assumed])
    part("Dropped:", [f"{e.key} = {value_of(e)}: {e.note}" for e in found if e.fate == "dropped"])
    unknown = [f"{e.key} = {value_of(e)} ({e.where}): {e.note}" for e in found if e.fate == "unknown"]
    part("Unknown to cosmos-rl, which ignored them without a word:", unknown)
    part("Notes:", list(notes))
    return lines


def _mapped(entry: Entry) -> str:
    to = ", ".join(entry.to) if entry.to else "as it is anyway"
    return f"{entry.key} = {value_of(entry)} -> {to}" + (f" ({entry.note})" if entry.note else "")


def _assumed(item: Assumed) -> str:
    value = "nothing" if item.value in (None, "", []) else show(item.value)
    return f"{item.key} = {value} -> {item.to}" + (f" ({item.note})" if item.note else "")


def value_of(entry: Entry) -> str:
    return "(hidden)" if is_secret(tuple(entry.key.split("."))) else show(entry.value)


def without_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without what it would say anyway; a section that is off by default keeps its keys' first."""
    return _prune(recipe, dict(_defaults(Recipe, ())), ())


def _prune(data: dict[str, Any], defaults: dict[KeyPath, Any], at: KeyPath) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in data.items():
        path = (*at, key)
        if isinstance(value, dict) and path not in defaults:
            inner = _prune(value, defaults, path)
            if inner or (value and _optional(path)):
                kept[key] = inner or dict(list(value.items())[:1])
        elif path not in defaults or not _equal(value, defaults[path]):
            kept[key] = value
    return kept


def _equal(value: Any, default: Any) -> bool:
    default = list(default) if isinstance(default, tuple) else default
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _defaults(model: type[BaseModel], at: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for name, info in model.model_fields.items():
        section = _section(info.annotation)
        if section is not None:
            yield from _defaults(section, (*at, name))
        elif info.default is not PydanticUndefined:
            yield (*at, name), info.default


def _section(annotation: Any) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _optional(path: KeyPath) -> bool:
    """Whether the section at `path` is null by default, so that an empty one says something."""
    model: type[BaseModel] = Recipe
    for name in path[:-1]:
        model = _section(model.model_fields[str(name)].annotation) or Recipe
    return model.model_fields[str(path[-1])].default is None


def _lines(data: dict[str, Any], at: KeyPath) -> Iterator[str]:
    indent = "  " * len(at)
    order = {name: index for index, name in enumerate(keys_at(Recipe, at))}
    for key in sorted(data, key=lambda name: order.get(name, len(order))):  # stable: the rest as it came
        value = _ordered(data[key], (*at, key))
        line = f"{indent}{flow_yaml(key)}: {flow_yaml(value)}"
        if isinstance(value, dict) and value and (len(line) > WIDTH or _leaves(value) > _SHORT):
            yield f"{indent}{flow_yaml(key)}:"
            yield from _lines(value, (*at, key))
        elif isinstance(value, list) and len(line) > WIDTH:
            yield f"{indent}{flow_yaml(key)}:"
            yield from (f"{indent}  - {flow_yaml(item)}" for item in value)
        else:
            yield line


def _ordered(value: Any, at: KeyPath) -> Any:
    if not isinstance(value, dict):
        return value
    order = {name: index for index, name in enumerate(keys_at(Recipe, at))}
    return {
        key: _ordered(value[key], (*at, key))
        for key in sorted(value, key=lambda name: order.get(name, len(order)))
    }


def _leaves(value: Any) -> int:
    return sum(_leaves(inner) for inner in value.values()) if isinstance(value, dict) else 1
