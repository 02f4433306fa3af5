"""Validate plain data against a pydantic model and say in one line each what is wrong.

Validation is strict (no text for numbers, no 1 for true), with one kindness: where text is wanted
and an unquoted number was written (`revision: 1234567`, `time: 30`), the text as written is taken.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hpc_rl.recipe.old_names import new_name
from hpc_rl.recipe.yaml_source import KeyPath, Problem, Source, dotted

M = TypeVar("M", bound=BaseModel)

_WANTED = {
    "string_type": "text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "finite_number": "a finite number",
}
_SECRET_KEY = re.compile(r"(?i)(^|[_-])(api[_-]?key|access[_-]?key|token|secret|password|passwd)$")
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def validate(
    model: type[M],
    data: Any,
    source: Source,
    prefix: KeyPath = (),
    *,
    renames: bool = True,
    also: tuple[str, ...] = (),
) -> tuple[M | None, list[Problem]]:
    """`(instance, [])`, or `(None, problems)`.

    `prefix` is the key path of `data` in the source; `renames` names the new key for keys of the
    systems that recipes are brought from; `also`: keys of the section that somebody else has read.
    """
    for _ in range(2):
        try:
            return model.model_validate_json(json.dumps(data), strict=True), []
        except ValidationError as error:
            errors = error.errors(include_url=False)
        if not _take_raw_text(errors, data, source, prefix):
            break
    problems = [_problem(model, detail, source, prefix, renames, also) for detail in errors]
    return None, list(dict.fromkeys(problems))


def _take_raw_text(errors: list[ErrorDetails], data: Any, source: Source, prefix: KeyPath) -> bool:
    """Replace unquoted numbers by their text where text is wanted; True if anything changed."""
    changed = False
    for detail in errors:
        value = detail["input"]
        if detail["type"] != "string_type" or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        place = source.places.get((*prefix, *detail["loc"]))
        if place is None or place.raw is None:
            continue
        target = data
        for part in detail["loc"][:-1]:
            target = target[part]
        target[detail["loc"][-1]] = place.raw
        changed = True
    return changed


def show(value: Any, limit: int = 80) -> str:
    """A value as it appears in a message: short, one line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def nearest(name: str, allowed: list[str]) -> str | None:
    """The allowed name that looks most like `name` (or, failing that, begins with it), or None."""
    by_lower = {word.lower(): word for word in reversed(allowed)}
    wanted = name.lower()
    close = difflib.get_close_matches(wanted, list(by_lower), n=1, cutoff=0.6)
    if not close and len(wanted) >= 3:  # an abbreviation: flash for flash_attention_2
        close = [word.lower() for word in allowed if word.lower().startswith(wanted)]
    return by_lower[close[0]] if close else None


def unknown_key(name: str, allowed: list[str], full_key: str, value: str, renames: bool) -> str:
    """The message for a key that does not exist here."""
    renamed = new_name(full_key) if renames else None
    if renamed is not None:
        return f"unknown key (value {value}); {renamed}"
    guess = nearest(name, allowed)
    hint = f" Did you mean '{guess}'?" if guess else ""
    listing = f" Allowed here: {', '.join(sorted(allowed))}." if allowed else " No key is allowed here."
    return f"unknown key (value {value}).{hint}{listing}"


def _problem(
    model: type[BaseModel],
    detail: ErrorDetails,
    source: Source,
    prefix: KeyPath,
    renames: bool,
    also: tuple[str, ...],
) -> Problem:
    path: KeyPath = (*prefix, *detail["loc"])
    place = source.where(path)
    return Problem(str(place) if place else "", dotted(path), _text(model, detail, path, renames, also))


def _text(
    model: type[BaseModel], detail: ErrorDetails, path: KeyPath, renames: bool, also: tuple[str, ...]
) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    shown = "(hidden)" if is_secret(path) or _holds_secret(value) else show(value)
    if kind == "extra_forbidden":
        allowed = keys_at(model, detail["loc"][:-1])
        allowed += [key for key in also if len(detail["loc"]) == 1 and key not in allowed]
        return unknown_key(str(path[-1]), allowed, dotted(path), shown, renames)
    if kind == "missing":
        return "is required and missing"
    if kind == "literal_error":
        values = str(context.get("expected", ""))
        guess = nearest(str(value), [part.strip("' ") for part in values.replace(" or ", ",").split(",")])
        return f"is {shown}; allowed: {values}" + (f". Did you mean '{guess}'?" if guess else "")
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        return f"is {shown}; must be {words} {context[key]}"
    if kind == "string_pattern_mismatch":
        return f"is {shown}; must match {context['pattern']}"
    if kind in _WANTED:
        return f"is {shown} ({_kind_of(value)}); must be {_WANTED[kind]}{_hint(kind, value)}"
    if kind == "value_error" and isinstance(value, dict):  # a check over several keys of the section
        return str(context.get("error", detail["msg"]))
    if kind == "value_error":
        return f"is {shown}; {context.get('error', detail['msg'])}"
    return f"is {shown}; {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def is_secret(path: KeyPath) -> bool:
    """True where a value must not appear in a message: secrets, and keys that look like one."""
    if path[:2] == ("cluster", "secrets"):
        return True
    return any(isinstance(part, str) and _SECRET_KEY.search(part) for part in path)


def _holds_secret(value: Any) -> bool:
    """True if a key inside the value looks like that of a secret."""
    if isinstance(value, dict):
        return any(is_secret((key,)) or key == "secrets" or _holds_secret(v) for key, v in value.items())
    return isinstance(value, list) and any(_holds_secret(item) for item in value)


def _hint(kind: str, value: Any) -> str:
    """What to change, for the mistakes that are made most."""
    if not isinstance(value, str):
        return ""
    if kind.startswith("bool") and value.lower() in ("on", "off", "yes", "no", "y", "n", "true", "false"):
        wanted = "true" if value.lower() in ("on", "yes", "y", "true") else "false"
        return f" (write {wanted}, without quotes)"
    if kind.startswith(("int", "float")):
        try:
            float(value.replace("_", ""))
        except ValueError:
            return ""
        return " (write digits without quotes or underscores)"
    return ""


def _kind_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    names = {str: "text", int: "an integer", float: "a number", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)


def keys_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that the model allows at `loc`."""
    current: type[BaseModel] | None = model
    for part in loc:
        if isinstance(part, int) or current is None:
            continue
        field = current.model_fields.get(part)
        current = _model_in(field.annotation) if field else None
    return list(current.model_fields) if current else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `X | None` or `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in get_args(annotation):
        found = _model_in(inner)
        if found is not None:
            return found
    return None
