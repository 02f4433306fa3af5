"""A reward for code that passes the row's tests. It runs confined (`sandbox/`), and the tests do not.

Tests run in the scorer and call the solution in its process, or compare what a program prints: code that
exits early, replaces `assert`'s machinery or looks for the tests gets nothing by it.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import importlib
import json
import os
import re
import sys
import time
import types
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import CodeType
from typing import Any

from hpc_rl.rewards.answers import final_part
from hpc_rl.rewards.base import RewardError
from hpc_rl.rewards.config import CodeConfig
from hpc_rl.rewards.sandbox.process import Ended, Limits, Session, run_program, why_not

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.M | re.S)
_PYTHON = ("python", "python3", "py")
# What tests often use without an import, because the prompt of the solution had it.
_MODULES = ("math", "random", "re", "string", "itertools", "collections", "functools", "heapq", "copy")
_ACTS = (ast.Assert, ast.Expr, ast.For, ast.While, ast.With, ast.Try, ast.If)
_PR_SET_DUMPABLE = 4


@dataclass(frozen=True)
class Pair:
    """A program is given `stdin` and should print `stdout`."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class Asserts:
    """Python that raises if the solution is wrong, then its functions `test*`."""

    code: CodeType
    functions: tuple[str, ...]
    check: bool


class Code:
    """Reward `code`."""

    def __init__(self, config: CodeConfig) -> None:
        self.config = config
        problem = why_not(self._limits(60.0))
        if problem is not None:
            raise RewardError(f"reward code runs nothing that it cannot confine, and here {problem}")
        if sys.platform == "linux":  # the solution, of the same user, must not read the tests in our memory
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)

    def score(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        """1.0 or 0.0, or with `partial` the share of tests passed; 0.0 without a Python block. Raises
        ValueError where the row's tests are none: a fault of the data."""
        column, entry_column = self.config.tests, self.config.entry_point
        if column not in fields:
            raise ValueError(f"reward code needs the row's column {column!r}, and this row has none")
        entry = None if entry_column is None else str(fields.get(entry_column, ""))
        cases = cases_of(fields[column], entry)
        source = last_block(final_part(response))
        if source is None:
            return 0.0
        until, passed = time.monotonic() + self.config.total_s, 0
        for case in cases:
            left = min(self.config.run_s, until - time.monotonic())
            if left > 0 and self._passes(source, case, entry, self._limits(left)):
                passed += 1
            elif not self.config.partial:
                return 0.0
        return passed / len(cases)

    def _limits(self, seconds: float) -> Limits:
        return Limits(seconds, self.config.memory_mb << 20, self.config.output_mb << 20)

    def _passes(self, source: str, case: Pair | Asserts, entry: str | None, limits: Limits) -> bool:
        if isinstance(case, Asserts):
            return passes(source, case, entry, limits)
        printed = run_program(source, case.stdin, limits)
        return printed is not None and _lines(printed) == _lines(case.stdout)


def last_block(text: str) -> str | None:
    """The last fenced block that is called Python; without one, the last that is called nothing."""
    blocks = _BLOCK.findall(text)
    for wanted in (_PYTHON, ("",)):
        for language, source in reversed(blocks):
            if language.lower() in wanted:
                return source
    return None


def cases_of(value: Any, entry: str | None) -> list[Pair | Asserts]:
    """A row's tests: Python source, or a list of such; `{inputs: [...], outputs: [...]}`, or a list of
    `{input, output}`; or JSON of these. Raises ValueError for anything else, and for tests of nothing."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except ValueError:
            pass  # Python that begins with a bracket
    if isinstance(value, dict):
        inputs, outputs = value.get("inputs"), value.get("outputs")
        if value.get("fn_name") is not None:
            raise ValueError("reward code has no tests by fn_name: write them as asserts")
        if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
            raise ValueError("reward code: tests need as many `inputs` as `outputs`, each a list of texts")
        value = [{"input": given, "output": wanted} for given, wanted in zip(inputs, outputs, strict=True)]
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("reward code: the row has no test")
    return [_case(item, entry) for item in items]


def _case(item: Any, entry: str | None) -> Pair | Asserts:
    if isinstance(item, dict) and isinstance(item.get("input"), str) and isinstance(item.get("output"), str):
        return Pair(item["input"], item["output"])
    if not isinstance(item, str):
        raise ValueError(f"reward code: a test is Python text or {{input, output}}, not {str(item)[:60]!r}")
    try:
        tree = ast.parse(item)
    except SyntaxError as error:
        raise ValueError(f"reward code: the row's tests are no Python: {error}") from error
    functions = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    check = entry is not None and "check" in functions
    tests = tuple(name for name in functions if name.startswith("test"))
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    if not (check or tests or any(isinstance(node, _ACTS) for node in body)):
        hint = "; set entry_point to the column that names the function" if "check" in functions else ""
        raise ValueError(f"reward code: the row's tests test nothing{hint}")
    return Asserts(compile(tree, "<tests>", "exec"), tests, check)


def passes(source: str, case: Asserts, entry: str | None, limits: Limits) -> bool:
    """Whether the tests run to their end. They see the solution's functions and classes by name, and as the
    module `solution`; names of Python's own are not the solution's to give."""
    module = types.ModuleType("solution")
    try:
        with Session(source, limits) as session, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            given = {name: remote for name, remote in session.names.items() if name not in vars(builtins)}
            vars(module).update(given)
            sys.modules["solution"] = module
            known = {name: importlib.import_module(name) for name in _MODULES}
            namespace: dict[str, Any] = {**given, **known, "__name__": "tests"}
            exec(case.code, namespace)
            for name in case.functions:
                namespace[name]()
            if case.check:
                namespace["check"](given[str(entry)])
    except (Ended, Exception, SystemExit):  # noqa: BLE001 -- however the tests end but at their end
        return False
    finally:
        sys.modules.pop("solution", None)
    return True


def _lines(text: str) -> list[str]:
    """Lines as judges compare them: without blanks at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
