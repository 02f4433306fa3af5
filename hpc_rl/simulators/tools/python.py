"""The tool `python`: code in a confined process (`rewards/sandbox`), a new one for each call.

A session that lives from call to call would have to be kept, bounded and lost with its replica; a call that
stands alone gives the same result whenever it is made.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from hpc_rl.rewards.sandbox.process import Limits, run_script, why_not
from hpc_rl.simulators.config import PythonToolConfig
from hpc_rl.simulators.tools.base import ToolError, function_schema

_OUR_FRAMES = re.compile(r'^  File "[^"\n]*child\.py", .*\n(?:    .*\n)*', re.M)


class Python:
    """See `Tool`."""

    def __init__(self, config: PythonToolConfig) -> None:
        self._limits = Limits(config.limit_s, config.memory_mb << 20, config.output_kb << 10)
        problem = why_not(Limits(60.0, self._limits.memory_bytes, self._limits.output_bytes))
        if problem is not None:
            raise RuntimeError(f"tool python runs nothing that it cannot confine, and here {problem}")
        self.schema = function_schema(
            "python",
            "Runs Python code in a new process and gives what it prints, or else the value of its last line.",
            {"code": {"type": "string", "description": "the code"}},
        )

    def call(self, arguments: dict[str, Any]) -> str:
        code = arguments.get("code")
        if not isinstance(code, str):
            raise ToolError("python needs `code`, a text")
        printed, end = run_script(last_value_printed(code), self._limits)
        text = _OUR_FRAMES.sub("", printed).strip()
        if end == "ok":
            return text
        why = {
            "failed": "the code failed",
            "time": f"the code took more than {self._limits.seconds:g} s",
            "output": f"the code printed more than {self._limits.output_bytes >> 10} KiB",
        }[end]
        raise ToolError(f"{why}\n{text}" if text else why)


def last_value_printed(source: str) -> str:
    """The source, with the value of a last expression printed as a notebook would (None is not)."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return source  # running it tells what is wrong
    if not tree.body or not isinstance(last := tree.body[-1], ast.Expr):
        return source
    shown = ast.parse("(lambda value: None if value is None else print(value))(0)").body[0]
    assert isinstance(shown, ast.Expr)
    assert isinstance(shown.value, ast.Call)
    shown.value.args = [last.value]
    tree.body[-1] = shown
    return ast.unparse(ast.fix_missing_locations(tree))
