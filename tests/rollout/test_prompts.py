"""Prompts to token ids: one beginning of sequence, chat templates, clear refusals."""

from __future__ import annotations

import pytest

from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.rollout.engine import PromptError
from hpc_rl.rollout.prompts import PromptCodec, prompt_text
from tests.tiny_models import word_tokenizer

pytestmark = pytest.mark.torch
SPEC = DatasetSpec(path="rows")
PLAIN = DatasetSpec(path="rows", chat=False)
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('must begin with user') }}{% endif %}"
    "<bos> {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w9{% endif %}"
)


def codec(template: str | None = None, adds_bos: bool = False) -> PromptCodec:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return PromptCodec(tokenizer)


def test_plain_text_has_at_most_one_bos() -> None:
    assert codec().encode("w1 w2", SPEC) == [5, 6]
    assert codec(adds_bos=True).encode("w1 w2", SPEC) == [0, 5, 6]
    assert codec(adds_bos=True).encode("<bos> w1", SPEC) == [0, 5]


def test_chat_template_is_used_if_there_is_one_or_asked_for() -> None:
    with_template = codec(TEMPLATE, adds_bos=True)
    unknown = 3
    expected = [0, unknown, 5, 13]  # <bos> "user" w1 w9
    assert with_template.encode("w1", SPEC) == expected
    assert with_template.encode([{"role": "user", "content": "w1"}], SPEC) == expected
    assert with_template.encode("w1", PLAIN) == [0, 5]
    with pytest.raises(PromptError, match="need a tokenizer with a chat template"):
        codec().encode([{"role": "user", "content": "w1"}], SPEC)
    with pytest.raises(PromptError, match="refuses the roles assistant: must begin with user"):
        with_template.encode([{"role": "assistant", "content": "w1"}], SPEC)


def test_empty_prompt_and_reward_text() -> None:
    with pytest.raises(PromptError, match="no tokens"):
        codec().encode("", SPEC)
    assert codec().decode([5, 1]) == "w1"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert prompt_text(chat) == "q"
    assert prompt_text("plain") == "plain"
