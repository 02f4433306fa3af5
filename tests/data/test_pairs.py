"""Preference pairs: every form of a row makes the same pair, and nothing cuts one side alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.data.encode import EncodedRow, Encoder, encode_prompt
from hpc_rl.data.errors import DataError
from hpc_rl.data.preference import check_pairs
from hpc_rl.data.preference_encode import PairEncoder
from hpc_rl.data.rows import load_rows
from hpc_rl.data.templates import ChatTemplate
from hpc_rl.recipe.schema import DatasetSpec
from tests.tiny_models import save_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
# Earlier answers are written in capitals: no rendering of the whole chat holds two answers.
REWRITING = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last else m.content | upper }}")
USER, GOOD, BAD = (
    {"role": role, "content": text}
    for role, text in (("user", "1+1="), ("assistant", "2"), ("assistant", "11"))
)
TEXTS = {"prompt": "1+1=", "chosen": "2", "rejected": "11"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    made.chat_template = CHAT
    return made


def spec_of(**options: Any) -> DatasetSpec:
    return DatasetSpec(path="pairs.jsonl", format="preference", **options)


def encode(tokenizer: Any, row: dict[str, Any], max_length: int | None = None, **options: Any) -> EncodedRow:
    spec = spec_of(**options)
    return PairEncoder(Encoder(tokenizer, spec, max_length), spec, max_length)(row, "pairs.jsonl: row 7")


def sides(tokenizer: Any, row: EncodedRow) -> list[tuple[str, str]]:
    """`(text, what of it is learned)` of the chosen and of the rejected sequence."""
    (one,) = row.sequences
    found = []
    for part in (slice(0, one.split), slice(one.split, None)):
        ids, mask = one.token_ids[part], one.loss_mask[part]
        learned = [token for token, kept in zip(ids, mask, strict=True) if kept]
        found.append(tuple("".join(tokenizer.convert_ids_to_tokens(x)) for x in (ids, learned)))
    return found


@pytest.mark.parametrize(
    "row",
    [
        TEXTS,
        {"prompt": [USER], "chosen": "2", "rejected": "11"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "1+1=", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "prompt": "1+1=",
            "chosen": [USER, GOOD],
            "rejected": [USER, BAD],
        },  # as HuggingFaceH4's sets have it
        {
            "chosen": [{"from": "human", "value": "1+1="}, GOOD],
            "rejected": [USER, {"from": "gpt", "value": "11"}],
        },
    ],
)
def test_every_form_of_a_chat_makes_the_same_pair(tokenizer: Any, row: dict[str, Any]) -> None:
    made = encode(tokenizer, row)
    expected = [("<u>1+1=<eos><a>2<eos>", "2<eos>"), ("<u>1+1=<eos><a>11<eos>", "11<eos>")]
    assert sides(tokenizer, made) == expected
    prompt = encode_prompt(tokenizer, "1+1=", spec_of())
    assert made.sequences[0].token_ids[: len(prompt)] == prompt  # what the sampler will be asked


def test_texts_without_a_template(tokenizer: Any) -> None:
    expected = [("1+1=2<eos>", "2<eos>"), ("1+1=11<eos>", "11<eos>")]
    assert sides(tokenizer, encode(tokenizer, TEXTS, chat=False)) == expected
    # Whole texts are never put into a chat; what they have in common is the prompt.
    assert sides(tokenizer, encode(tokenizer, {"chosen": "1+1=2", "rejected": "1+1=11"})) == expected
    tokenizer.chat_template = None
    assert sides(tokenizer, encode(tokenizer, TEXTS)) == expected
    assert (
        sides(tokenizer, encode(tokenizer, {**TEXTS, "prompt": "x", "q": "1+1"}, template="{q}=")) == expected
    )


def test_a_system_text_and_longer_common_prefixes(tokenizer: Any) -> None:
    chat = [USER, GOOD, {"role": "user", "content": "2+2="}]
    row = {"chosen": [*chat, {"role": "assistant", "content": "4"}], "rejected": [*chat, BAD]}
    (chosen, learned), (_, other) = sides(tokenizer, encode(tokenizer, row, system="add"))
    assert chosen == "<s>add<eos><u>1+1=<eos><a>2<eos><u>2+2=<eos><a>4<eos>"
    assert (learned, other) == ("4<eos>", "11<eos>")  # not the answer that both have


def test_answers_after_the_prefix_are_all_learned_where_one_text_holds_them(tokenizer: Any) -> None:
    again = {"role": "user", "content": "2+2="}
    row = {"chosen": [USER, GOOD, again, {"role": "assistant", "content": "4"}], "rejected": [USER, BAD]}
    (_, learned), _ = sides(tokenizer, encode(tokenizer, row))
    assert learned == "2<eos>4<eos>"
    tokenizer.chat_template = REWRITING
    row["chosen"][1] = {"role": "assistant", "content": "two"}
    with pytest.raises(DataError, match="row 7: 2 answers follow what chosen and rejected have in common"):
        encode(tokenizer, row)


def test_both_sides_are_cut_or_none(tokenizer: Any) -> None:
    def long(chosen: int, rejected: int) -> dict[str, Any]:
        return {"prompt": "1+1=", "chosen": "2" * chosen, "rejected": "1" * rejected}

    both = encode(tokenizer, long(30, 20), 12, chat=False)
    assert (both.truncated, both.dropped) == (1, 0)
    assert sides(tokenizer, both) == [("1+1=" + "2" * 8, "2" * 8), ("1+1=" + "1" * 8, "1" * 8)]
    for chosen, rejected in ((30, 3), (3, 30)):
        one = encode(tokenizer, long(chosen, rejected), 12, chat=False)
        assert (one.sequences, one.truncated, one.dropped) == ([], 0, 1)
    dropped = encode(tokenizer, long(30, 30), 12, chat=False, overlong="drop")
    assert (dropped.sequences, dropped.dropped) == ([], 1)
    with pytest.raises(DataError, match="row 7 has 35 tokens on one side"):
        encode(tokenizer, long(3, 30), 12, chat=False, overlong="error")


def test_pairs_that_teach_nothing_are_dropped_and_counted(tokenizer: Any) -> None:
    for row in ({**TEXTS, "rejected": "2"}, {"chosen": [USER, GOOD], "rejected": [USER, GOOD]}):
        made = encode(tokenizer, row)
        assert (made.sequences, made.dropped) == ([], 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no column 'rejected'; its columns are 'prompt', 'chosen'"),
        ({**TEXTS, "chosen": 3}, "column 'chosen' must be text or a list of messages, this is int"),
        ({**TEXTS, "chosen": []}, "column 'chosen' must be a list of messages"),
        ({**TEXTS, "chosen": [GOOD]}, "must both be text, or both be messages"),
        (
            {"chosen": "2", "rejected": "3"},
            "has no column 'prompt', and 'chosen' and 'rejected' do not begin alike",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no column 'prompt', and 'chosen' begins with the answer"),
        ({"chosen": [USER, USER], "rejected": [USER, BAD]}, "'chosen' must end with an assistant message"),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "?"}, BAD]},
            "message 0 of 'chosen', where they part, has role user",
        ),
        ({"chosen": [{**USER, "role": "me"}, GOOD], "rejected": [USER, BAD]}, "message 0 has role 'me'"),
        (
            {
                "chosen": [{**USER, "content": [{"type": "image", "image": "a.png"}]}, GOOD],
                "rejected": [USER, BAD],
            },
            "has images or videos; preference pairs are text alone",
        ),
    ],
)
def test_what_is_wrong_with_a_row(tokenizer: Any, tmp_path: Path, row: dict[str, Any], said: str) -> None:
    """In the run, and before it: with file and row."""
    with pytest.raises(DataError, match=r"pairs\.jsonl: row 7") as error:
        encode(tokenizer, row)
    assert said in str(error.value)
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (TEXTS, row)))
    spec = spec_of().model_copy(update={"path": str(path)})
    with pytest.raises(DataError, match=f"{path}: row 1") as error:
        check_pairs(load_rows(spec), spec, template=ChatTemplate(CHAT))
    assert said in str(error.value)
    assert check_pairs(load_rows(spec), spec, max_rows=1, template=ChatTemplate(CHAT)) == 1
