"""From rows to token ids: plain, chat, and templates that are awkward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc_rl.data.encode import Encoder, encode_prompt
from hpc_rl.data.errors import DataError
from hpc_rl.recipe.schema import DatasetSpec

SPEC = DatasetSpec(path="x", format="prompt_completion")
ROW = {"prompt": "1+1=", "completion": "2"}
CHAT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    from tests.tiny_models import save_tokenizer

    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))


def encode_completion(tokenizer: Any, row: dict[str, Any], spec: DatasetSpec) -> tuple[list[int], list[int]]:
    (one,) = Encoder(tokenizer, spec)(row).sequences
    return one.token_ids, one.loss_mask


def text(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_plain_prompts_and_completions(tokenizer: Any) -> None:
    ids, mask = encode_completion(tokenizer, ROW, SPEC)
    assert text(tokenizer, ids) == "1+1=2<eos>"
    assert mask == [0, 0, 0, 0, 1, 1]
    assert text(tokenizer, encode_prompt(tokenizer, "1+1=", SPEC)) == "1+1="


def test_text_trains_on_all_but_the_first_token(tokenizer: Any) -> None:
    ids, mask = encode_completion(tokenizer, {"text": "abc"}, DatasetSpec(path="x", format="text"))
    assert text(tokenizer, ids) == "abc<eos>"
    assert mask == [0, 1, 1, 1]


def test_chat_templates_end_the_turn_themselves(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    ids, mask = encode_completion(tokenizer, ROW, SPEC)
    assert text(tokenizer, ids) == "<u>1+1=<eos><a>2<eos>"
    assert text(tokenizer, [i for i, m in zip(ids, mask, strict=True) if m]) == "2<eos>"
    prompt = encode_prompt(tokenizer, "1+1=", SPEC)
    assert ids[: len(prompt)] == prompt  # what the sampler is asked is what was trained
    assert (
        text(tokenizer, encode_prompt(tokenizer, "1+1=", SPEC.model_copy(update={"chat": False}))) == "1+1="
    )
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]
    assert text(tokenizer, encode_prompt(tokenizer, system, SPEC)) == "<s>S<eos><u>q<eos><a>"


def test_a_template_that_rewrites_the_prompt_still_gives_one_sequence(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    ids, mask = encode_completion(tokenizer, ROW, SPEC)
    assert text(tokenizer, ids) == "1<u>1+1=<eos><a>2<eos>"
    assert sum(mask) == 2


def test_templates_that_refuse_or_are_missing(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "S"}]
    with pytest.raises(DataError, match="need a tokenizer with a chat template"):
        encode_prompt(tokenizer, messages, SPEC)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DataError, match="refuses the roles system: no system role"):
        encode_prompt(tokenizer, messages, SPEC)
