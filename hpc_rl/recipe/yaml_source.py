"""YAML with line numbers: plain values plus, for every key path, where it was written.

Scalars follow the YAML 1.2 core schema, so `1e-6` is a number, `off` and `yes` are text and
`08:00:00` is text. The YAML 1.1 readings (text, booleans, base-60 integers) surprise everybody.
Duplicate keys are errors. PyYAML's composer does the parsing; only scalar meaning is ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]{1,400}\Z")  # Python refuses thousands of digits with a traceback
_OCT = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)\Z")
_NULL = ("", "~", "null", "Null", "NULL")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}

_MAX_DEPTH, _MAX_VALUES = 64, 100_000  # aliases can make a short file endless

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RESOLVER: Any = yaml.resolver.Resolver()


@dataclass(frozen=True)
class Where:
    """Where a value was written. `raw` is the text of a plain scalar, None for anything else."""

    origin: str  # a file name, or "override"
    line: int | None
    folder: Path  # relative paths in the value are relative to this
    raw: str | None = None

    @property
    def override(self) -> bool:
        """Whether an `a.b=value` said it."""
        return self.line is None and self.origin.startswith("override")

    def __str__(self) -> str:
        return self.origin if self.line is None else f"{self.origin}:{self.line}"


Places = dict[KeyPath, Where]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: place, key path and what to do about it."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class RecipeError(ValueError):
    """A recipe (or site profile) cannot be used. `problems` holds one entry per mistake."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


@dataclass
class Source:
    """A YAML document as plain data, with the place of every key path."""

    data: dict[str, Any]
    places: Places = field(default_factory=dict)

    def where(self, path: KeyPath) -> Where | None:
        """The place of `path`, or of its nearest parent that was written."""
        for end in range(len(path), -1, -1):
            place = self.places.get(path[:end])
            if place is not None:
                return place
        return None


def dotted(path: KeyPath) -> str:
    return ".".join(str(part) for part in path)


def plain_scalar(text: str) -> Any:
    """The value of an unquoted scalar by the YAML 1.2 core schema."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text):
        return int(text)
    if _OCT.match(text):
        return int(text[2:], 8)
    if _HEX.match(text):
        return int(text[2:], 16)
    if _FLOAT.match(text):
        return float(text)
    if _INF.match(text):
        return float(text.replace(".", ""))
    if text in (".nan", ".NaN", ".NAN"):
        return float("nan")
    return text


def _is_plain(node: Any) -> bool:
    """True for a scalar without quotes (libyaml says '', the Python parser None)."""
    return not node.style


def _explicit_tag(node: Any) -> str | None:
    """The tag that was written before a value (`!!str`, `!foo`), or None. PyYAML gives every node one."""
    value, implicit = (
        (node.value, (_is_plain(node), True)) if isinstance(node, yaml.ScalarNode) else (None, (True, True))
    )
    if node.tag == _RESOLVER.resolve(type(node), value, implicit):
        return None
    standard = "tag:yaml.org,2002:"
    return "!!" + node.tag.removeprefix(standard) if node.tag.startswith(standard) else str(node.tag)


class _Reader:
    """Turns a composed node tree into plain data, collecting places and problems."""

    def __init__(self, origin: str, folder: Path) -> None:
        self.origin = origin
        self.folder = folder
        self.places: Places = {}
        self.problems: list[Problem] = []

    def _place(self, path: KeyPath, node: Any, raw: str | None = None) -> None:
        self.places[path] = Where(self.origin, node.start_mark.line + 1, self.folder, raw)

    def _refuse_tag(self, node: Any, path: KeyPath) -> None:
        tag = _explicit_tag(node)
        if tag is not None:
            where = f"{self.origin}:{node.start_mark.line + 1}"
            message = (
                f"YAML tags ({tag}) are not read; remove it, and put text that looks like a number in quotes"
            )
            self.problems.append(Problem(where, dotted(path), message))

    def value(self, node: Any, path: KeyPath) -> Any:
        if len(path) > _MAX_DEPTH or len(self.places) > _MAX_VALUES:
            what = f"is nested deeper than {_MAX_DEPTH} levels"
            if len(path) <= _MAX_DEPTH:
                what = f"has more than {_MAX_VALUES} values"
            message = f"{what}; look for aliases (*name) that repeat themselves"
            raise RecipeError([Problem(f"{self.origin}:{node.start_mark.line + 1}", "", message)])
        self._refuse_tag(node, path)
        if isinstance(node, yaml.ScalarNode):
            plain = _is_plain(node)
            self.places.setdefault(path, Where(self.origin, node.start_mark.line + 1, self.folder))
            if plain:
                place = self.places[path]
                self.places[path] = Where(place.origin, place.line, place.folder, node.value)
            return plain_scalar(node.value) if plain else node.value
        self.places.setdefault(path, Where(self.origin, node.start_mark.line + 1, self.folder))
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, item in enumerate(node.value):
                self._place((*path, index), item)
                items.append(self.value(item, (*path, index)))
            return items
        return self._mapping(node, path)

    def _mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(f"{self.origin}:{line}", dotted(path), "a key must be text"))
                continue
            self._refuse_tag(key_node, path)
            key = key_node.value
            if key == "<<" and _is_plain(key_node):
                self.problems.append(
                    Problem(f"{self.origin}:{line}", dotted(path), "'<<' merges are not read; use 'extends'")
                )
                continue
            if key in result:
                first = self.places[(*path, key)].line
                self.problems.append(
                    Problem(
                        f"{self.origin}:{line}",
                        dotted((*path, key)),
                        f"duplicate key (first written in line {first}); keep one of the two",
                    )
                )
                continue
            self._place((*path, key), key_node)
            result[key] = self.value(value_node, (*path, key))
        return result


def parse_yaml(text: str, origin: str, folder: Path) -> Source:
    """Parse one document that must be a mapping.

    Raises RecipeError with file and line for a syntax error, a duplicate key or a non-mapping.
    """
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        tab = "\\t" in str(error.problem) or (mark and _starts_with_tab(text, mark.line))
        hint = "; indent with spaces, not tabs" if tab else ""
        message = f"not valid YAML: {error.problem or error.context}{hint}"
        raise RecipeError([Problem(f"{origin}{line}", "", message)]) from error
    except yaml.YAMLError as error:  # for example a character that YAML does not allow
        raise RecipeError([Problem(origin, "", f"not valid YAML: {error}")]) from error
    if node is None:
        return Source({}, {(): Where(origin, 1, folder)})
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError([Problem(f"{origin}:1", "", "must be a mapping of keys to values")])
    reader = _Reader(origin, folder)
    data = reader.value(node, ())
    if reader.problems:
        raise RecipeError(reader.problems)
    return Source(data, reader.places)


def _starts_with_tab(text: str, line: int) -> bool:
    lines = text.splitlines()
    return line < len(lines) and "\t" in lines[line][: -len(lines[line].lstrip()) or None]


def read_yaml(path: Path) -> Source:
    """Read a YAML file. Raises RecipeError when it cannot be read or parsed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError([Problem(str(path), "", "no such file")]) from error
    except IsADirectoryError as error:
        raise RecipeError([Problem(str(path), "", "is a folder, not a YAML file")]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([Problem(str(path), "", f"is not UTF-8 text ({error.reason})")]) from error
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from error
    return parse_yaml(text, _shown(path), path.resolve().parent)


def _shown(path: Path) -> str:
    """The path as a user would type it: relative where it lies below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_absolute() and path.is_relative_to(here) else str(path)


def parse_value(text: str, origin: str = "override", folder: Path | None = None) -> tuple[Any, Places]:
    """The value of an override, `a.b=TEXT`, read as YAML, and the places of what is inside it.

    Raises ValueError when it is not YAML.
    """
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {text!r}") from error
    folder = folder or Path.cwd()
    if node is None:
        return None, {(): Where(origin, None, folder, text)}
    reader = _Reader(origin, folder)
    value = reader.value(node, ())
    if reader.problems:
        raise ValueError(reader.problems[0].message)
    return value, {path: replace(place, line=None) for path, place in reader.places.items()}
