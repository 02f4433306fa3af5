"""What chat templates write between two turns, alone, and which of them cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hpc_rl.data.errors import DataError
from hpc_rl.data.observations import Observations
from hpc_rl.data.templates import ChatTemplate
from tests.data.chat_templates import ALL, PARTS

TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "d", "parameters": {}}}]
SEEN = [{"role": "tool", "name": "calculator", "content": "4"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ONE = "<tool_response>\n4\n</tool_response>"

BETWEEN = {
    "mistral": f"</s>[INST] {ONE} [/INST]",
    "gemma": f"<end_of_turn>\n<start_of_turn>user\n{ONE}<end_of_turn>\n<start_of_turn>model\n",
    "llama3": "<|eot_id|><|start_header_id|>tool<|end_header_id|>\n\n4<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi4": "<|im_end|><|im_start|>tool<|im_sep|>4<|im_end|><|im_start|>assistant<|im_sep|>",
    "qwen3": "<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n",
    "qwen3_marked": "<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n",
    "harmony": "<|end|><|start|>tool<|message|>4<|end|><|start|>assistant",
    "r1": "</s><|user|>4<|assistant|><think>\n",
    "plain": "\ntool: 4\nassistant:",
    "phi3": "<|end|>\n<|tool|>\n4<|end|>\n<|assistant|>\n",
    "qwq": "<|im_end|>\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n<think>\n",
}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, TOKENS)


@pytest.mark.parametrize("family", ALL)
def test_what_stands_between_two_turns(family: str) -> None:
    assert Observations(template(ALL[family]), TOOLS).text(SEEN) == BETWEEN[family]


def test_templates_that_take_parts_only() -> None:
    assert Observations(template(PARTS), TOOLS).text(SEEN) == "<|end|><|tool|>4<|end|><|assistant|>"


def test_results_in_a_row_are_one_message_where_roles_alternate() -> None:
    text = Observations(template(ALL["gemma"]), TOOLS).text([*SEEN, {**SEEN[0], "content": "5"}])
    both = f"{ONE}\n<tool_response>\n5\n</tool_response>"
    assert text == f"<end_of_turn>\n<start_of_turn>user\n{both}<end_of_turn>\n<start_of_turn>model\n"


def test_tools_are_listed_by_the_template_or_by_instructions() -> None:
    question: list[dict[str, Any]] = [{"role": "user", "content": "2+2?"}]
    assert Observations(template(ALL["qwen3"]), TOOLS).prompt(question) == (question, TOOLS)
    told, tools = Observations(template(ALL["gemma"]), TOOLS).prompt(question)
    assert tools is None
    assert [message["role"] for message in told] == ["user"]
    assert told[0]["content"].endswith("2+2?")
    assert json.dumps(TOOLS[0]) in told[0]["content"]
    assert '{"name": <function-name>, "arguments": <args-json-object>}' in told[0]["content"]
    system = [{"role": "system", "content": "Be brief."}, *question]
    told, _ = Observations(template(ALL["llama3"]), TOOLS).prompt(system)
    assert told[0]["content"].startswith("Be brief.\n\n# Tools")
    assert told[1] == question[0]
    without = Observations(template(ALL["gemma"]))
    assert without.prompt(question) == (question, None)
    answer = without.text([{"role": "user", "content": "go on"}])
    assert answer == "<end_of_turn>\n<start_of_turn>user\ngo on<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (
            "{% for m in messages %}{{ m.content if m.role == 'assistant' }}{% endfor %}",
            "prints the message 0 times",
        ),
        ("{{ messages[0].content }}", "does not print the assistant's turn once"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}",
            "depends on the turns before",
        ),
        ("{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}", "one turn"),
    ],
)
def test_templates_that_cannot_are_refused(source: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        Observations(template(source), TOOLS)
    with pytest.raises(DataError, match=f"cannot show an observation.*{why}"):
        Observations(template(source))
