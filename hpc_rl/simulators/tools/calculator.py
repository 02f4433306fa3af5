"""The tool `calculator`: arithmetic over Python's syntax tree. Nothing is ever executed."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from hpc_rl.simulators.config import CalculatorConfig
from hpc_rl.simulators.tools.base import ToolError, function_schema

MAX_CHARS = 1000
MAX_BITS = 4096  # of an integer: a power must not fill the memory

Number = int | float
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitXor: operator.pow,  # as people write powers
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs, "round": round, "min": min, "max": max, "sqrt": math.sqrt, "exp": math.exp, "log": math.log,
    "log2": math.log2, "log10": math.log10, "sin": math.sin, "cos": math.cos, "tan": math.tan,
    "floor": math.floor, "ceil": math.ceil, "gcd": math.gcd, "lcm": math.lcm,
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "e": math.e}


class Calculator:
    """See `Tool`."""

    def __init__(self, config: CalculatorConfig) -> None:
        self.schema = function_schema(
            "calculator",
            "Evaluates an arithmetic expression, such as (3 + 4.5) * 2 ** 3 or sqrt(2).",
            {"expression": {"type": "string", "description": "the expression"}},
        )

    def call(self, arguments: dict[str, Any]) -> str:
        expression = arguments.get("expression")
        if not isinstance(expression, str):
            raise ToolError("calculator needs `expression`, a text")
        return evaluate(expression)


def evaluate(expression: str) -> str:
    """The value as text: integers exactly, others to twelve digits. Raises ToolError."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression is longer than {MAX_CHARS} characters")
    source = expression.replace("×", "*").replace("÷", "/").replace("−", "-").strip()
    try:
        value = _value(ast.parse(source, mode="eval").body)
    except SyntaxError as error:
        raise ToolError(f"{expression!r} is no arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except OverflowError as error:
        raise ToolError("the value is too large") from error
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ToolError(f"{expression!r} cannot be evaluated: {error}") from error
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ToolError("the value is not finite")
    return f"{value:.12g}"


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=bool()):
            raise ToolError(f"{ast.unparse(node)} is no number")
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _value(left), _value(right)
            if isinstance(op, ast.Pow | ast.BitXor):
                _power_fits(a, b)
            return _bounded(_BINARY[type(op)](a, b))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_FUNCTIONS[name](*(_value(argument) for argument in args)))
    raise ToolError(f"{ast.unparse(node)[:80]!r} is no arithmetic")


def _power_fits(base: Number, exponent: Number) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise OverflowError


def _bounded(value: Any) -> Number:
    if not isinstance(value, int | float):  # a complex root
        raise ToolError("the value is no real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError
    return value
