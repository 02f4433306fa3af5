"""What is learned of a chat, family by family: the answers and their ends, behind what inference sees."""

# ruff: noqa: E501
from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from hpc_rl.data.encode import EncodedRow, Encoder
from hpc_rl.data.errors import DataError
from hpc_rl.data.tokens import Control, tokenise
from hpc_rl.recipe.schema import DatasetSpec
from tests.data.chat_templates import ALL, PARTS, make_tokenizer

TURNS = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "the answer is four"},
]
THOUGHTS = [
    {"role": "user", "content": "two and two?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nyes"},
]


def encode(family: str | None, messages: list[dict[str, Any]], **spec: Any) -> tuple[Any, EncodedRow]:
    tokenizer = make_tokenizer(ALL[family] if family else None)
    options = {"path": "x", "format": "chat", **spec}
    return tokenizer, Encoder(tokenizer, DatasetSpec(**options))({"messages": messages}, "rows.jsonl: row 7")


def learned(tokenizer: Any, row: EncodedRow) -> list[str]:
    """The learned text of each sequence, the turns apart by `|`."""
    texts = []
    for one in row.sequences:
        runs: list[list[int]] = [[]]
        for token, mask in zip(one.token_ids, one.loss_mask, strict=True):
            if mask:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        texts.append("|".join(tokenizer.decode(run) for run in runs if run))
    return texts


LEARNED = {
    "mistral": [" four</s>| the answer is four</s>"],
    "gemma": ["four<end_of_turn>|the answer is four<end_of_turn>"],
    "llama3": ["four<|eot_id|>|the answer is four<|eot_id|>"],
    "phi4": ["four<|im_end|>|the answer is four<|im_end|>"],
    # History is rewritten: a sequence for each answer, the first without what comes after it.
    "qwen3": [
        "<think>\n\n</think>\n\nfour<|im_end|>",
        "<think>\n\n</think>\n\nthe answer is four<|im_end|>",
    ],
    "qwen3_marked": ["four<|im_end|>|<think>\n\n</think>\n\nthe answer is four<|im_end|>"],
    "harmony": [
        "<|channel|>final<|message|>four<|return|>",
        "<|channel|>final<|message|>the answer is four<|return|>",
    ],
    "r1": ["four</s>", "the answer is four</s>"],
    "phi3": ["four<|end|>|the answer is four<|end|>"],
    "qwq": ["four<|im_end|>", "the answer is four<|im_end|>"],
    "plain": [" four\n| the answer is four\n</s>"],
}


@pytest.mark.parametrize("family", ALL)
def test_answers_and_their_ends_are_learned_and_nothing_else(family: str) -> None:
    tokenizer, row = encode(family, TURNS)
    assert learned(tokenizer, row) == LEARNED[family]
    assert (row.dropped, row.truncated, row.repaired) == (0, 0, 0)


@pytest.mark.parametrize("family", ALL)
def test_train_on_last_learns_the_last_answer_alone(family: str) -> None:
    tokenizer, row = encode(family, TURNS, train_on="last")
    (text,) = learned(tokenizer, row)
    assert LEARNED[family][-1].endswith(text)
    assert text.count("four") == 1
    assert "the answer is four" in text


@pytest.mark.parametrize("family", ALL)
def test_the_context_of_an_answer_is_what_inference_sees(family: str) -> None:
    """Up to the first learned token of the last answer lies the prompt that the template makes."""
    tokenizer, row = encode(family, THOUGHTS)
    for one, upto in zip(row.sequences, (1, 3) if len(row.sequences) == 2 else (3,), strict=True):
        prompt = tokenizer.apply_chat_template(THOUGHTS[:upto], add_generation_prompt=True)["input_ids"]
        first = max(t for t in range(1, len(one.loss_mask)) if one.loss_mask[t] and not one.loss_mask[t - 1])
        assert one.token_ids[:first] == list(prompt)


def test_the_thoughts_of_each_turn_are_learned_where_history_drops_them() -> None:
    tokenizer, row = encode("qwen3", THOUGHTS)
    assert learned(tokenizer, row) == [
        "<think>\nhm\n</think>\n\nfour<|im_end|>",
        "<think>\nwell\n</think>\n\nyes<|im_end|>",
    ]
    assert "hm" not in tokenizer.decode(row.sequences[1].token_ids)
    # The prompt opened the thought already; no rendering has it, so the row's own text is learned.
    tokenizer, row = encode("r1", THOUGHTS)
    assert learned(tokenizer, row) == ["hm\n</think>\n\nfour</s>", "well\n</think>\n\nyes</s>"]


CALLS = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}]


def test_tool_calls_and_thoughts_survive_where_the_prompt_opens_a_thought() -> None:
    def answer(**fields: Any) -> list[str]:
        return learned(*encode("qwq", [TURNS[0], {"role": "assistant", **fields}]))

    call = '<tool_call>{"a": 2}</tool_call><|im_end|>'
    assert answer(content="<think>\nhm\n</think>\n\n", tool_calls=CALLS) == [f"hm\n</think>\n\n{call}"]
    assert answer(content="let me add", tool_calls=CALLS) == [f"let me add\n{call}"]
    assert answer(content=None, tool_calls=CALLS) == [call]
    for field in ("reasoning_content", "thinking"):
        assert answer(content="yes", **{field: "hm"}) == ["hm\n</think>\n\nyes<|im_end|>"]


def test_what_an_answer_would_lose_is_an_error_unless_the_template_marks_it() -> None:
    """R1 writes no tool calls; the other prompt opens nothing that a thought could follow."""
    with pytest.raises(DataError, match=r"row 7: message 1 \(assistant\) has tool calls that"):
        encode("r1", [TURNS[0], {"role": "assistant", "content": "a", "tool_calls": CALLS}])
    rewritten = "{{ messages | length }}" + ALL["llama3"]
    messages = [TURNS[0], {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    spec = DatasetSpec(path="x", format="chat")
    with pytest.raises(DataError, match="'reasoning_content' that the chat template leaves out"):
        Encoder(make_tokenizer(rewritten), spec)({"messages": messages})
    content = "m['content'] | trim + '<|eot_id|>' }}"
    assert f" + {content}" in rewritten
    block = "{% generation %}{{ m.get('reasoning_content', '') + " + content + "{% endgeneration %}"
    marked = rewritten.replace(f" + {content}", " }}" + block)
    tokenizer = make_tokenizer(marked)
    row = Encoder(tokenizer, spec)({"messages": messages})
    assert learned(tokenizer, row)[-1].endswith("hma<|eot_id|>")


QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_an_answer_that_begins_the_chat_is_learned_without_its_header() -> None:
    tokenizer = make_tokenizer(QWEN25)
    row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS[1:]})
    assert learned(tokenizer, row) == ["four<|im_end|>|the answer is four<|im_end|>"]
    tokenizer, row = encode("llama3", TURNS[1:])
    assert learned(tokenizer, row) == LEARNED["llama3"]


def test_answers_between_tools_share_one_sequence() -> None:
    messages = [
        *TURNS[:3],
        {"role": "assistant", "content": "", "tool_calls": CALLS},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "yes"},
    ]
    tokenizer, row = encode("qwen3", messages)
    assert learned(tokenizer, row)[1:] == [
        '<think>\n\n</think>\n\n<tool_call>{"a": 2}</tool_call><|im_end|>|<think>\n\n</think>\n\nyes<|im_end|>'
    ]
    spec = DatasetSpec(path="x", format="chat")
    tools = '[{"type": "function", "function": {"name": "add", "description": null}}]'
    row = Encoder(tokenizer, spec)({"messages": messages, "tools": tools})
    assert '{"name": "add"}' in tokenizer.decode(row.sequences[0].token_ids)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_bos_comes_at_most_once_and_tokens_are_those_of_the_whole_text(family: str, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(ALL[family], adds_bos)
    row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS})
    for one in row.sequences:
        assert one.token_ids.count(tokenizer.bos_token_id) == int("bos_token" in ALL[family])
    if len(row.sequences) == 1:
        whole = list(tokenizer.apply_chat_template(TURNS)["input_ids"])
        whole = whole[:-1] if family == "phi3" else whole  # EOS that closes a rendering, not a turn
        assert row.sequences[0].token_ids[: len(whole)] == whole


def test_the_text_is_cut_where_the_prompt_alone_has_other_tokens() -> None:
    """Inference tokenises the prompt alone: line breaks at its end are one token then."""
    tokenizer = make_tokenizer(ALL["llama3"], gpt2=True)
    prompt = tokenizer.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    assert tokenizer.apply_chat_template(TURNS)["input_ids"][: len(prompt)] != prompt
    row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS})
    assert row.sequences[0].token_ids[: len(prompt)] == list(prompt)
    assert learned(tokenizer, row) == LEARNED["llama3"]


def test_added_tokens_that_are_blank_are_text() -> None:
    """As in Gemma: the line break behind the end of a turn is a token of its own, and not learned."""
    for family, template in (
        ("gemma", ALL["gemma"]),
        ("r1", ALL["r1"].replace("eos_token }}", "'<|im_end|>\n' }}")),
    ):
        tokenizer = make_tokenizer(template)
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("\n", "\n\n")])
        row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS})
        assert learned(tokenizer, row) == [text.replace("</s>", "<|im_end|>") for text in LEARNED[family]]


def test_templates_that_take_parts_only_get_parts() -> None:
    tokenizer = make_tokenizer(PARTS)
    row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS})
    assert learned(tokenizer, row) == ["four<|end|>|the answer is four<|end|>"]


def test_bos_of_template_and_text_are_one() -> None:
    tokenizer = make_tokenizer("{{ bos_token }}" + ALL["llama3"])
    row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS})
    assert row.sequences[0].token_ids.count(tokenizer.bos_token_id) == 1
    assert learned(tokenizer, row) == LEARNED["llama3"]
    plain = Encoder(make_tokenizer(), DatasetSpec(path="x", format="text"))({"text": "<s>the answer"})
    assert plain.sequences[0].token_ids.count(tokenizer.bos_token_id) == 1


def test_blocks_that_leave_out_the_end_of_a_turn_still_learn_it() -> None:
    template = ALL["qwen3_marked"].replace(
        "{{- '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{- '<|im_end|>' }}"
    )
    assert template != ALL["qwen3_marked"]
    tokenizer = make_tokenizer(template)
    row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS})
    assert learned(tokenizer, row) == LEARNED["qwen3_marked"]


def test_text_that_ends_with_eos_learns_it_once() -> None:
    tokenizer = make_tokenizer()
    row = Encoder(tokenizer, DatasetSpec(path="x", format="text"))({"text": "four</s>"})
    assert learned(tokenizer, row) == ["four</s>"]


def test_pad_that_is_eos_does_not_hide_the_end() -> None:
    tokenizer = make_tokenizer(ALL["mistral"])
    tokenizer.pad_token = tokenizer.eos_token
    row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS})
    assert learned(tokenizer, row) == LEARNED["mistral"]
    assert row.sequences[0].token_ids[-1] == tokenizer.eos_token_id
    assert row.sequences[0].loss_mask[-1] == 1


@pytest.mark.parametrize("text", ["ünïcode 🙂🙂", "  blanks  ", "\n\nlines\n\n", "日本語", " "])
def test_no_byte_of_an_answer_is_lost_or_added(text: str) -> None:
    """Byte-level tokenizers trim blanks from offsets and give one offset to all tokens of a character."""
    messages = [
        {"role": "user", "content": f"q{text}"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": f"{text}b"},
    ]
    tokenizer, row = encode("phi4", messages)
    assert learned(tokenizer, row) == [f"{text}<|im_end|>|{text}b<|im_end|>"]


def test_a_tokenizer_without_offsets_gives_the_same_learned_text() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = ALL["plain"]
    assert not tokenizer.is_fast
    row = Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS})
    assert learned(tokenizer, row) == LEARNED["plain"]


@pytest.mark.parametrize("family", ["plain", "llama3", "r1", "qwq"])
def test_control_tokens_inside_an_answer_do_not_end_it_without_offsets(family: str) -> None:
    from transformers import ByT5Tokenizer

    messages = [TURNS[0], {"role": "assistant", "content": "<think>hm</think> the answer is <b> four"}]

    def made(tokenizer: Any) -> tuple[Any, EncodedRow]:
        tokenizer.add_tokens(
            ["<think>", "</think>", "<b>", "<s>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
        )
        tokenizer.chat_template = ALL[family].replace("bos_token", "'<s>'")
        return tokenizer, Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": messages})

    slow, fast = made(ByT5Tokenizer()), made(make_tokenizer())
    assert not slow[0].is_fast
    assert fast[0].is_fast
    assert "the answer is <b> four" in learned(*slow)[0]
    # What a tokenizer adds is not in the text, and takes nothing from it.
    tokens = tokenise(slow[0], "a<b>c", Control(slow[0]), special=True)
    assert slow[0].convert_ids_to_tokens(tokens.ids) == ["a", "<b>", "c", "</s>"]
    assert list(zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True)) == [
        (0, 1),
        (1, 4),
        (4, 5),
        (4, 4),
    ]
    assert learned(*slow) == learned(*fast)


REPAIRS: list[Any] = [
    ("mistral", ["merge_roles"], [("user", "a"), ("user", "b"), ("assistant", "c")], "[INST] a\n\nb [/INST] c</s>"),
    ("gemma", ["move_system"], [("system", "S"), ("user", "a"), ("assistant", "c")],
     "<start_of_turn>user\nS\n\na<end_of_turn>\n<start_of_turn>model\nc<end_of_turn>\n"),
    ("mistral", ["drop_empty", "merge_roles"],
     [("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c"), ("assistant", "d")],
     "[INST] a\n\nb [/INST] c\n\nd</s>"),
    ("mistral", ["move_system", "merge_roles"], [("system", "S"), ("user", "a"), ("user", "b"), ("assistant", "c")],
     "[INST] S\n\na\n\nb [/INST] c</s>"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "how", "turns", "expected"), REPAIRS)
def test_repairs(family: str, how: list[str], turns: list[tuple[str, str]], expected: str) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    with pytest.raises(DataError, match="row 7: message"):
        encode(family, messages)
    tokenizer, row = encode(family, messages, repair=how)
    assert tokenizer.decode(row.sequences[0].token_ids) == "<s>" + expected
    assert row.repaired == 1


def test_messages_that_differ_in_their_thoughts_are_not_merged() -> None:
    first = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    messages = [TURNS[0], first, {"role": "assistant", "content": "b", "reasoning_content": "well"}]
    tokenizer, row = encode("phi4", messages, repair=["merge_roles"])
    assert learned(tokenizer, row) == ["a<|im_end|>|b<|im_end|>"]
    assert row.repaired == 0
    with pytest.raises(DataError, match="message 2 has role assistant as the one before, and they differ"):
        encode("mistral", messages, repair=["merge_roles"])
    tokenizer, row = encode("phi4", [*messages[:2], {**first, "content": "c"}], repair=["merge_roles"])
    assert learned(tokenizer, row) == ["a\n\nc<|im_end|>"]


def test_overlong_rows_are_cut_dropped_or_an_error() -> None:
    tokenizer = make_tokenizer(ALL["phi4"])
    length = len(
        Encoder(tokenizer, DatasetSpec(path="x", format="chat"))({"messages": TURNS}).sequences[0].token_ids
    )

    def limited(most: int, how: str) -> EncodedRow:
        spec = DatasetSpec(path="x", format="chat", overlong=how)
        return Encoder(tokenizer, spec, max_length=most)({"messages": TURNS}, "row 1")

    cut = limited(length - 1, "truncate")
    assert (len(cut.sequences[0].token_ids), cut.truncated, cut.dropped) == (length - 1, 1, 0)
    assert limited(length, "drop").dropped == 0
    assert (limited(length - 1, "drop").sequences, limited(length - 1, "drop").dropped) == ([], 1)
    # Cut before the first answer, nothing is left to learn.
    assert (limited(5, "truncate").sequences, limited(5, "truncate").dropped) == ([], 1)
    with pytest.raises(DataError, match=f"row 1 has {length} tokens"):
        limited(length - 1, "error")


def test_prompt_completion_splits_where_the_sampler_would() -> None:
    tokenizer = make_tokenizer()
    spec = DatasetSpec(path="x", format="prompt_completion")
    for prompt, completion in [("the ans", "wer is four"), ("the answer is", " four"), ("", "four")]:
        row = Encoder(tokenizer, spec)({"prompt": prompt, "completion": completion})
        one = row.sequences[0]
        asked = list(tokenizer(prompt).input_ids)
        assert one.token_ids[: len(asked)] == asked
        assert tokenizer.decode(one.token_ids[len(asked) :]) == completion + "</s>"
        assert one.loss_mask == [0] * len(asked) + [1] * (len(one.token_ids) - len(asked))
