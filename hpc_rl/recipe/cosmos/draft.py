"""A recipe in the making: what was read, what it became, and what is said about every key.

Translators read with `get` and write with `put`; each key that the file writes ends with exactly one fate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hpc_rl.recipe.cosmos.keys import KEYS, Key
from hpc_rl.recipe.cosmos.toml_source import TomlSource
from hpc_rl.recipe.messages import is_secret, show
from hpc_rl.recipe.yaml_source import Problem

Fate = Literal["mapped", "dropped", "unknown"]


@dataclass
class Entry:
    """What became of one key of the file. `to` are recipe keys; `note` says what differs, or why."""

    key: str
    value: Any
    fate: Fate
    to: list[str] = field(default_factory=list)
    note: str = ""
    where: str = ""

    def as_json(self) -> dict[str, Any]:
        hidden = {"value": "(hidden)"} if is_secret(tuple(self.key.split("."))) else {}
        return {**asdict(self), **hidden}


@dataclass
class Assumed:
    """A recipe key that comes from a default of cosmos-rl's, not from the file."""

    key: str
    value: Any
    to: str
    note: str = ""


class Draft:
    """`recipe` is the nested recipe so far; `origins` says from which keys of the file a recipe key came;
    `table` is what is known of the file's keys."""

    def __init__(self, source: TomlSource, table: Mapping[str, Key] = KEYS) -> None:
        self.source, self.table = source, table
        self.recipe: dict[str, Any] = {}
        self.entries: dict[str, Entry] = {}
        self.assumed: dict[str, Assumed] = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.origins: dict[str, list[str]] = {}
        self._values: dict[str, Any] = {}

    # --- reading -------------------------------------------------------------------------------------
    def load(self, key: str, value: Any) -> None:
        """Take the value of a known key, if it is of the key's kind (as pydantic's lax mode takes it)."""
        for kind in self.table[key].kind.split("|"):
            taken = _TAKE[kind](value)
            if taken is not None:
                self._values[key] = taken
                return
        wanted = " or ".join(_WORDS[kind] for kind in self.table[key].kind.split("|"))
        self.bad(key, f"is {show(value)}; must be {wanted}")

    def get(self, key: str) -> Any:
        """The file's value, else cosmos-rl's default."""
        return self._values.get(key, self.table[key].default)

    def written(self, key: str) -> bool:
        return key in self._values

    def bad(self, key: str, message: str) -> None:
        self.problems.append(self.source.problem(message, key))

    # --- writing -------------------------------------------------------------------------------------
    def put(self, to: str, value: Any, *keys: str, note: str = "") -> None:
        """Write the recipe key `to`, which comes from `keys` (those of them that the file writes)."""
        section = self.recipe
        *above, name = to.split(".")
        for part in above:
            section = section.setdefault(part, {})
        section[name] = value
        self.origins[to] = [key for key in keys if self.written(key)] or list(keys)
        for key in keys:
            if self.written(key):
                self._mapped(key, to, note)
            elif key not in self.assumed:
                self.assumed[key] = Assumed(key, self.table[key].default, to, note)

    def same(self, key: str, note: str = "") -> None:
        """The key says what the recipe says without a word; nothing to write."""
        if self.written(key):
            self._mapped(key, "", note)

    def drop(self, key: str, why: str = "") -> None:
        """Say why the key is not in the recipe, if the file writes it and nobody has said more."""
        if self.written(key) and key not in self.entries:
            reason = why or self.table[key].why
            assert reason, f"{key} is dropped without a reason"
            self._enter(Entry(key, self._values[key], "dropped", note=reason))

    def unknown(self, key: str, value: Any, note: str, fate: Fate = "unknown") -> None:
        self._enter(Entry(key, value, fate, note=note))

    def _mapped(self, key: str, to: str, note: str) -> None:
        entry = self.entries.get(key)
        if entry is None:
            entry = Entry(key, self._values[key], "mapped")
            self._enter(entry)
        if to and to not in entry.to:
            entry.to.append(to)
        if note and note not in entry.note:
            entry.note = f"{entry.note}; {note}" if entry.note else note

    def _enter(self, entry: Entry) -> None:
        entry.where = self.source.where(entry.key)
        self.entries[entry.key] = entry

    def finish(self) -> None:
        """Every key that the file writes and no translator took is dropped, with the table's reason.

        Then the entries are put in the order of the file.
        """
        for key in self._values:
            if key in self.entries:
                continue
            if any(self._values[key] == value for value in self.table[key].same):
                self.same(key)
            else:
                why = (
                    self.table[key].why
                    or f"nothing in this file uses it (it would become {self.table[key].to[0]})"
                )
                self.drop(key, why)
        order = {key: index for index, key in enumerate(self._values)}
        self.entries = dict(sorted(self.entries.items(), key=lambda item: order.get(item[0], len(order))))


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _number(value: Any) -> float | int | None:
    """A finite number; text of one counts, as pydantic reads it."""
    if isinstance(value, str):
        try:
            value = float(value) if not value.strip().lstrip("+-").isdecimal() else int(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    usual = abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)  # TOML counts in 64 bits
    return value if usual else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number == int(number) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _list_of(take: Callable[[Any], Any]) -> Callable[[Any], list[Any] | None]:
    def taken(value: Any) -> list[Any] | None:
        items = [take(item) for item in value] if isinstance(value, list) else [None]
        return None if None in items else items

    return taken


def _map(value: Any) -> dict[str, Any] | None:
    return value if isinstance(value, dict) else None


_TAKE: dict[str, Callable[[Any], Any]] = {
    "flag": _flag,
    "count": _count,
    "number": _number,
    "text": _text,
    "texts": _list_of(_text),
    "numbers": _list_of(_number),
    "counts": _list_of(_count),
    "map": _map,
    "any": lambda value: value,
}
_WORDS = {
    "flag": "true or false",
    "count": "an integer",
    "number": "a finite number",
    "text": "text",
    "texts": "a list of texts",
    "numbers": "a list of numbers",
    "counts": "a list of integers",
    "map": "a table",
    "any": "anything",
}
