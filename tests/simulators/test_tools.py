"""Tools in real processes: what they answer, what they cannot do, and what a bad one costs."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.recipe.extensions import register, registry
from hpc_rl.recipe.yaml_source import RecipeError
from hpc_rl.simulators.base import Result, SimulatorError, SimulatorSettings, Task, Turn, make_simulator
from hpc_rl.simulators.tools.base import ToolError
from hpc_rl.simulators.tools.calculator import evaluate

pytestmark = pytest.mark.timeout(120)

PLUGIN = '''
import asyncio, os, time
from hpc_rl.recipe.extensions import register
from hpc_rl.simulators.tools.base import function_schema

def lookup(word: str, limit: int = 3) -> str:
    """Looks a word up
    in the dictionary.

    Not for the policy to read.
    """
    print("noise on stdout", flush=True)
    return f"{word} {limit}"

async def patient(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds

def naughty(how: str):
    """Misbehaves."""
    if how == "hang":
        while True:
            time.sleep(1)
    if how == "crash":
        os._exit(7)
    if how == "exit":
        raise SystemExit("bye")
    raise KeyError(how)

class Echo:
    schema = function_schema("echo", "Says it again.", {"text": {"type": "string"}})
    def __init__(self, config):
        pass
    def call(self, arguments):
        return arguments["text"]

register("tools", "echo", implementation="tool_plugin:Echo")
'''


def section(*tools: Any, **options: Any) -> dict[str, Any]:
    return {"name": "tools", "tools": list(tools), **options}


def tool_call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def turns(mapping: dict[str, Any], *texts: str, folder: Path | None = None) -> tuple[list[Result], list[Any]]:
    """Each text as a turn of its own; the results and the schemas."""

    async def run() -> tuple[list[Result], list[Any]]:
        settings = SimulatorSettings(
            registry("simulators").config("tools", mapping),
            slots=len(texts),
            plugins=("tool_plugin.py",) if folder else (),
            code=str(folder or ""),
        )
        simulator = make_simulator("tools", settings)
        try:
            await simulator.start()
            slots = list(range(len(texts)))
            await simulator.reset(slots, [Task(row=slot) for slot in slots], slots)
            results = [(await simulator.step([slot], [Turn(texts[slot])]))[0] for slot in slots]
            return results, simulator.tools  # type: ignore[attr-defined]
        finally:
            await simulator.close()

    return asyncio.run(run())


def said(result: Result) -> str:
    return str(result.observation[0]["content"])


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37*48", "1776"), ("0.1 + 0.2", "0.3"), ("7/2", "3.5"), ("8/2", "4"), ("2**10", "1024"),
        ("2^10", "1024"), ("-(3 - 5) * 4 % 5", "3"), ("sqrt(2)", "1.41421356237"), ("10 // 3", "3"),
        ("max(3, 4) + pi", "7.14159265359"), ("3 × 4 ÷ 6 − 1", "1"), ("10**30 + 1", "1" + "0" * 29 + "1"),
    ],
)  # fmt: skip
def test_the_calculator_calculates(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("1/0", "division by zero"), ("9**9**9", "too large"), ("10**1000 * 10**1000", "too large"),
        ("1e308 * 10", "not finite"), ("(-8)**0.5", "no real number"), ("log(0)", "cannot be evaluated"),
        ("__import__('os')", "no arithmetic"), ("open('/etc/passwd')", "no arithmetic"),
        ("x + 1", "no arithmetic"),
        ("(1).real", "no arithmetic"), ("[1, 2]", "no arithmetic"), ("True + 1", "no number"),
        ("'a' * 9", "no arithmetic"),
        ("1 +", "no arithmetic expression"), ("", "no arithmetic expression"), ("1" * 1001, "longer than"),
        ("(" * 400 + "1" + ")" * 400, "no arithmetic expression|cannot be evaluated"),
        ("sqrt()", "cannot be evaluated"),
    ],
)  # fmt: skip
def test_the_calculator_refuses(expression: str, why: str) -> None:
    with pytest.raises(ToolError, match=why):
        evaluate(expression)


def test_python_prints_and_is_confined() -> None:
    mapping = section({"name": "python", "limit_s": 2, "output_kb": 4})
    codes = [
        "print('a')\n6 * 7",
        "def f(x):\n    return 1 / x\nf(0)",
        "while True: pass",
        "print('x' * 9999)",
    ]
    codes += ["import socket\nsocket.socket()", "x = 1", "if"]
    results, schemas = turns(
        mapping, *(tool_call("python", code=code) for code in codes), tool_call("python")
    )
    texts = [said(result) for result in results]
    assert texts[0] == "a\n42"
    assert texts[1].startswith("Error: the code failed\nTraceback")
    assert texts[1].endswith("ZeroDivisionError: division by zero")
    assert "child.py" not in texts[1]
    assert texts[2] == "Error: the code took more than 2 s"
    assert texts[3].startswith("Error: the code printed more than 4 KiB\nxxx")
    assert "Operation not permitted" in texts[4]
    assert texts[5] == ""
    assert "SyntaxError" in texts[6]
    assert texts[7] == "Error: python needs `code`, a text"
    assert [result.info["tool_errors"] for result in results] == [0, 1, 1, 1, 1, 0, 1, 1]
    assert schemas[0]["function"]["name"] == "python"


def test_functions_of_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "tool_plugin.py").write_text(PLUGIN)
    function = {"name": "function", "function": "tool_plugin:lookup"}
    patient = {
        "name": "function",
        "function": "tool_plugin:patient",
        "called": "wait",
        "description": "Waits.",
    }
    # In a run the plugins are imported before the recipe is validated.
    register("tools", "echo", implementation="tool_plugin:Echo")
    texts = [
        tool_call("lookup", word="a"),
        tool_call("lookup", word="a", limit=5),
        tool_call("lookup", word=1),
    ]
    texts += [
        tool_call("lookup", word="a", size=2),
        tool_call("wait", seconds=0.01),
        tool_call("echo", text="hi"),
    ]
    results, schemas = turns(section(function, patient, "echo"), *texts, folder=tmp_path)
    assert [said(result) for result in results] == [
        "a 3",
        "a 5",
        "Error: argument 'word': Input should be a valid string",
        "Error: argument 'size': Extra inputs are not permitted",
        "0.01",
        "hi",
    ]
    assert schemas[0] == {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Looks a word up in the dictionary.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string"}, "limit": {"type": "integer", "default": 3}},
                "required": ["word"],
            },
        },
    }
    assert [schema["function"]["name"] for schema in schemas] == ["lookup", "wait", "echo"]


def test_a_tool_that_hangs_or_crashes_costs_its_call_alone(tmp_path: Path) -> None:
    (tmp_path / "tool_plugin.py").write_text(PLUGIN)
    naughty = {"name": "function", "function": "tool_plugin:naughty", "limit_s": 0.5}
    texts = [tool_call("naughty", how=how) for how in ("hang", "crash", "exit", "raise")]
    texts += [tool_call("calculator", expression="1+1") + tool_call("naughty", how="hang")]
    began = time.monotonic()
    results, _ = turns(
        section(naughty, "calculator", error_reward=-0.5, call_reward=0.25), *texts, folder=tmp_path
    )
    assert time.monotonic() - began < 60
    assert [said(result) for result in results] == [
        "Error: naughty took more than 0.5 s",
        "Error: naughty crashed: the tool process ended with code 7",
        "Error: SystemExit: bye",
        "Error: KeyError: 'raise'",
        "2",
    ]
    assert [message["content"] for message in results[4].observation][
        1
    ] == "Error: naughty took more than 0.5 s"
    assert all(result.reward == -0.5 and not result.done for result in results)
    assert results[4].info["tool_calls"] == 2
    assert results[4].info["tool_errors"] == 1


def test_turns_without_calls_and_calls_that_are_none() -> None:
    one = tool_call("calculator", expression="1+1")
    texts = [
        "It is 2.",
        "<tool_call>{</tool_call>",
        tool_call("search", q="x"),
        one * 3,
        tool_call("calculator", expression="10**60"),
    ]
    mapping = section("calculator", max_calls=2, max_chars=30, call_reward=0.25)
    results, _ = turns(mapping, *texts)
    assert (results[0].done, results[0].observation, results[0].reward) == (True, [], 0.0)
    assert "the call is not JSON" in said(results[1])
    assert said(results[2]) == "Error: there is no tool 'search'; "[:30] + "\n[25 characters left out]"
    assert [message["content"] for message in results[3].observation] == [
        "2",
        "2",
        "Error: only 2 calls are made i\n[10 characters left out]",
    ]
    assert results[4].reward == 0.25


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (section(), "tools"),
        (section("calculater"), "Did you mean 'calculator'"),
        (section({"name": "python", "limit": 3}), "unknown key"),
        (section("calculator", "calculator"), "two tools are called 'calculator'"),
        (section({"name": "function", "function": "search"}), "module:function"),
        (section("calculator", max_turn=3), "Did you mean 'max_turns'"),
        (section("calculator", parser="xml"), "hermes"),
        (section(3), "must be the name of a tool"),
    ],
)  # fmt: skip
def test_bad_sections_are_explained(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        registry("simulators").config("tools", mapping)


def test_tools_that_cannot_be_made_are_known_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "tool_plugin.py").write_text(PLUGIN)
    mapping = section({"name": "function", "function": "tool_plugin:nothing"})
    with pytest.raises(SimulatorError, match="has no function 'nothing'"):
        turns(mapping, "x", folder=tmp_path)
