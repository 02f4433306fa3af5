"""TOML with line numbers: `tomllib` gives the values, a small scanner the line of every key.

The scanner runs only over text that `tomllib` has accepted, so it needs no error cases of its own.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_rl.recipe.yaml_source import Problem, RecipeError

_AT_LINE = re.compile(r" \(at line (\d+), column \d+\)$")
_KEY_PART = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*""")
_QUOTES = ('"""', "'''", '"', "'")
_OPEN, _CLOSE = "[{", "]}"

TomlPath = tuple[str, ...]


@dataclass
class TomlSource:
    """A TOML document as plain data, with the line of its tables and keys.

    `lines` knows the keys that begin a statement; a key inside an inline table lies on the line of it.
    """

    data: dict[str, Any]
    origin: str
    lines: dict[TomlPath, int] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """`file:line` of a dotted key, or of its nearest written parent."""
        parts = tuple(key.split("."))
        for end in range(len(parts), 0, -1):
            if parts[:end] in self.lines:
                return f"{self.origin}:{self.lines[parts[:end]]}"
        return self.origin

    def problem(self, message: str, key: str) -> Problem:
        return Problem(self.where(key), key, message)


def read_toml(path: Path) -> TomlSource:
    """Read a TOML file. Raises RecipeError with file and line when it cannot be read or parsed."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise RecipeError([Problem(str(path), "", "no such file")]) from error
    except IsADirectoryError as error:
        raise RecipeError([Problem(str(path), "", "is a folder, not a TOML file")]) from error
    except OSError as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error.strerror}")]) from error
    try:
        return parse_toml(raw.decode("utf-8-sig"), str(path))  # a byte order mark is no mistake of the user's
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError([Problem(f"{path}:{line}", "", f"is not UTF-8 text ({error.reason})")]) from error


def parse_toml(text: str, origin: str) -> TomlSource:
    """Parse one document. Raises RecipeError for what is not TOML."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = _AT_LINE.search(str(error))
        where = f"{origin}:{at.group(1)}" if at else origin
        message = f"not valid TOML: {_AT_LINE.sub('', str(error))}"
        raise RecipeError([Problem(where, "", message)]) from error
    except ValueError as error:  # an integer of thousands of digits
        raise RecipeError([Problem(origin, "", f"not readable as TOML: {error}")]) from error
    except RecursionError as error:
        raise RecipeError([Problem(origin, "", "is nested too deeply to be a configuration")]) from error
    return TomlSource(data, origin, key_lines(text.replace("\r\n", "\n")))


def key_lines(text: str) -> dict[TomlPath, int]:
    """The line of every table header and of every key that begins a statement (and of their parents)."""
    lines: dict[TomlPath, int] = {}
    table: TomlPath = ()
    at, counted, number = 0, 0, 1
    while at < len(text):
        end_of_line = _line_end(text, at)
        line = text[at:end_of_line].strip()
        number += text.count("\n", counted, at)
        counted = at
        if not line or line.startswith("#"):
            at = end_of_line + 1
        elif line.startswith("["):
            inside = text.index("[", at) + (2 if line.startswith("[[") else 1)
            table = _key(text, inside)[0]
            _note(lines, table, number)
            at = end_of_line + 1
        else:
            key, after = _key(text, at)
            _note(lines, table + key, number)
            at = _statement_end(text, after + 1) + 1
    return lines


def _note(lines: dict[TomlPath, int], path: TomlPath, number: int) -> None:
    for end in range(1, len(path) + 1):
        lines.setdefault(path[:end], number)


def _line_end(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end


def _key(text: str, at: int) -> tuple[TomlPath, int]:
    """The dotted key that begins at `at`, and where it ends (at `=` or `]`)."""
    parts: list[str] = []
    while (match := _KEY_PART.match(text, at)) is not None:
        parts.append(next(part for part in match.groups() if part is not None))
        at = match.end()
        if text[at : at + 1] != ".":
            break
        at += 1
    return tuple(parts), at


def _statement_end(text: str, at: int) -> int:
    """The end of the line on which the value that begins at `at` ends."""
    depth = 0
    while at < len(text):
        quote = next((q for q in _QUOTES if text.startswith(q, at)), None)
        if quote is not None:
            at = _string_end(text, at + len(quote), quote)
            continue
        char = text[at]
        if char == "#":
            at = _line_end(text, at)
            continue
        if char == "\n" and depth <= 0:
            return at
        depth += (char in _OPEN) - (char in _CLOSE)
        at += 1
    return at


def _string_end(text: str, at: int, quote: str) -> int:
    """Behind the quotes that end the string whose content begins at `at`."""
    while at < len(text) and not text.startswith(quote, at):
        at += 2 if text[at] == "\\" and quote[0] == '"' else 1
    at += len(quote)
    while len(quote) == 3 and text[at : at + 1] == quote[0]:  # a quote may stand right before the end
        at += 1
    return at
