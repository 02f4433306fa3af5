"""Tool calls in text, and that they are what vLLM's parser finds."""

from __future__ import annotations

import json

import pytest

from hpc_rl.simulators.tools.parsers import Call, Malformed, bare_json, hermes

GOOD = '{"name": "calculator", "arguments": {"expression": "1+1"}}'
CALL = Call("calculator", {"expression": "1+1"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 2.", []),
        (f"<tool_call>\n{GOOD}\n</tool_call>", [CALL]),
        (f"Let me see. <tool_call>{GOOD}</tool_call>\n<tool_call>{GOOD}</tool_call>", [CALL, CALL]),
        (f"<tool_call>{GOOD}", [CALL]),
        (f"<think>maybe <tool_call>{GOOD}</tool_call></think>2", []),
        (f"<think>so</think><tool_call>{GOOD}</tool_call>", [CALL]),
        (f"<think>no end <tool_call>{GOOD}</tool_call>", []),
        ('<tool_call>{"name": "now"}</tool_call>', [Call("now", {})]),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [Call("f", {"a": 1})]),
    ],
)
def test_hermes(text: str, expected: list[Call]) -> None:
    assert hermes(text) == expected


@pytest.mark.parametrize(
    "inside",
    [
        *("", "{", "calculator(1+1)", "[1]", "[" * 100_000, '{"arguments": {}}', '{"name": 3}'),
        *('{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": "x"}'),
    ],
)
def test_malformed_calls_are_found_and_say_why(inside: str) -> None:
    (found,) = hermes(f"<tool_call>{inside}</tool_call>")
    assert isinstance(found, Malformed)
    assert found.why


def test_bare_json_is_a_call_only_where_it_is_one() -> None:
    llama = '{"name": "calculator", "parameters": {"expression": "1+1"}}'
    for text in (llama, f"<|python_tag|>{llama}", f"```json\n{llama}\n```", f"<think>x</think>\n{llama}"):
        assert bare_json(text) == [CALL]
    assert bare_json(f"[{llama}, {llama}]") == [CALL, CALL]
    assert (
        bare_json('{"answer": 2}') == bare_json("[1, 2]") == bare_json("2") == bare_json(f"So: {llama}") == []
    )
    (broken,) = bare_json('{"name": "calculator", ')
    assert isinstance(broken, Malformed)


class _Vocabulary:
    """What vLLM's parser asks of a tokenizer before it looks at text."""

    def __init__(self) -> None:
        self._ids = {"<tool_call>": 1, "</tool_call>": 2}

    def get_vocab(self) -> dict[str, int]:
        return self._ids

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self._ids[text]]

    def decode(self, ids: list[int]) -> str:
        return "".join(word for word, number in self._ids.items() if number in ids)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "text",
    [
        "The answer is 2.",
        f"<tool_call>\n{GOOD}\n</tool_call>",
        f"First.\n<tool_call>{GOOD}</tool_call>\n<tool_call>{GOOD.replace('1+1', '2+2')}</tool_call>",
        f"<tool_call>{GOOD}",
        '<tool_call>{"name": "f", "arguments": {"nested": {"a": [1, "</x>", null]}}}</tool_call> later',
    ],
)
def test_the_calls_are_those_of_vllms_parser(text: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "q"}])
    theirs = Hermes2ProToolParser(_Vocabulary()).extract_tool_calls(text, request)  # type: ignore[arg-type]
    expected = [Call(t.function.name, json.loads(t.function.arguments)) for t in theirs.tool_calls]
    assert hermes(text) == expected
