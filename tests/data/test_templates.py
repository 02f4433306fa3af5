"""Our rendering of chat templates is transformers'; what they refuse is said with message and role."""

# ruff: noqa: E501
from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.data.chat import Conversation
from hpc_rl.data.errors import DataError
from hpc_rl.data.templates import ChatTemplate, TemplateRefused
from hpc_rl.data.turns import renderings
from tests.data.chat_templates import ALL, QWEN3, QWEN3_MARKED, make_tokenizer

CHAT = [
    {"role": "user", "content": "two & two?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes", "thinking": "well"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a<b & ü"}}]


def chat(*turns: tuple[str, str]) -> Conversation:
    return Conversation([{"role": role, "content": content} for role, content in turns])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("generate", [False, True])
def test_every_template_renders_as_transformers_renders_it(name: str, generate: bool) -> None:
    tokenizer = make_tokenizer(ALL[name])
    template = ChatTemplate.of_tokenizer(tokenizer)
    messages = CHAT[:3] if generate else CHAT
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    assert template.render(messages, generate=generate) == expected
    with_tools = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert template.render(messages, tools=TOOLS) == with_tools


def test_generation_blocks_are_found_where_transformers_finds_them() -> None:
    tokenizer = make_tokenizer(QWEN3_MARKED)
    template = ChatTemplate.of_tokenizer(tokenizer)
    text, spans = template.marked(CHAT)
    assert text == template.render(CHAT)
    made = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(made["input_ids"], made["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "".join(text[a:b] for a, b in spans)
    assert [text[a:b] for a, b in spans] == ["four<|im_end|>", "<think>\n\n</think>\n\nyes<|im_end|>"]
    assert ChatTemplate(QWEN3).marked(CHAT)[1] == []


def test_a_template_is_read_from_a_folder_as_the_tokenizer_reads_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("mistral", "qwen3"):
        make_tokenizer(ALL[name]).save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        template = ChatTemplate.read(tmp_path / name)
        assert template is not None
        assert template.render(CHAT) == loaded.apply_chat_template(CHAT, tokenize=False)
    make_tokenizer(None).save_pretrained(tmp_path / "none")
    assert ChatTemplate.read(tmp_path / "none") is None
    (tmp_path / "none" / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}'
    )
    template = ChatTemplate.read(tmp_path / "none")
    assert template is not None
    assert (template.render(CHAT), template.render(CHAT, tools=TOOLS)) == ("D", "T")


def test_the_date_is_that_of_the_run() -> None:
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", today=datetime(2025, 2, 3))
    assert template.render(CHAT) == "2025-02-03"


def test_templates_that_raise_or_are_none() -> None:
    with pytest.raises(DataError, match="chat template is not a Jinja template"):
        ChatTemplate("{% if %}")
    with pytest.raises(TemplateRefused, match="refuses the roles user"):
        ChatTemplate("{{ messages[0]['content'] + 1 }}").render(CHAT[:1])


REFUSED: list[Any] = [
    ("mistral", [("system", "S"), ("user", "a"), ("assistant", "b")], "row 3: message 0 has role system; repair: .move_system."),
    ("gemma", [("system", "S"), ("user", "a"), ("assistant", "b")], "message 0 has role system.*System role not supported"),
    ("mistral", [("user", "a"), ("user", "b"), ("assistant", "c")], "row 3: message 1 has role user as the one before; repair: .merge_roles."),
    ("gemma", [("user", "a"), ("assistant", "b"), ("assistant", "c")], "message 2 has role assistant as the one before"),
    ("mistral", [("assistant", "a"), ("user", "b"), ("assistant", "c")], "message 0, the first, has role assistant"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "turns", "message"), REFUSED)
def test_refusals_name_row_message_and_role(family: str, turns: list[tuple[str, str]], message: str) -> None:
    template = ChatTemplate(ALL[family], {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(DataError, match=message):
        renderings(template, chat(*turns), "assistant", "rows.jsonl: row 3")


def test_a_chat_without_an_answer_at_its_end_is_refused() -> None:
    template = ChatTemplate(ALL["phi4"])
    with pytest.raises(DataError, match=r"row 0: the messages must end with an assistant message"):
        renderings(template, chat(("user", "a")), "assistant", "row 0")
