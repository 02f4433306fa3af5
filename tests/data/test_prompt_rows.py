"""Rows with images and videos as prompts for RL: formats, answers, what the controller sends, and `check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from hpc_rl.cli._data_check import data_findings
from hpc_rl.data.errors import DataError
from hpc_rl.data.prompt_rows import has_media
from hpc_rl.data.prompts import media_row, prompt_of
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import load_recipe
from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.rollout.prompts import prompt_text
from tests.data.chat_templates import make_tokenizer

IMAGE = {"type": "image"}
PARTS = "{% for p in m.content %}{{ p.text or '<i>' }}{% endfor %}"
VISION = "{% for m in messages %}{{ m.role }}:" + PARTS + "{% endfor %}"


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_llava_rows_end_before_their_last_answer() -> None:
    turns = ["<image>\nwhat?", "a cat", "and <image> here?", "a dog"]
    names = ["human", "gpt"] * 2
    row: dict[str, Any] = {
        "id": 7, "image": ["a.png", "b.png"],
        "conversations": [{"from": n, "value": t} for n, t in zip(names, turns, strict=True)],
    }  # fmt: skip
    spec = DatasetSpec(path="x", format="llava", system="Look.")
    content, answer, fields = prompt_of(row, spec)
    assert content == [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [IMAGE, text("what?")]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [text("and "), IMAGE, text(" here?")]},
    ]
    assert (answer, fields) == ("a dog", {"id": 7})
    assert has_media(content)
    assert prompt_text(content) == "and  here?"
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(content)) == content
    found = media_row(row, spec)
    assert found is not None
    assert found.conversation.images == ["a.png", "b.png"]
    row["conversations"][3]["value"] = "<image>"  # in the answer: no part of the prompt
    row["image"].append("c.png")
    found = media_row(row, spec)
    assert found is not None
    assert found.conversation.images == ["a.png", "b.png"]
    del row["conversations"][3]
    row["image"].pop()
    assert prompt_of({**row, "answer": 3}, spec)[1] == "3"
    assert prompt_of(row, spec)[1] is None
    del row["image"]
    row["conversations"] = [{"from": "human", "value": "hello"}]
    content, _, _ = prompt_of(row, spec)
    assert content[-1] == {"role": "user", "content": "hello"}
    assert not has_media(content)


def test_columns_of_media_beside_a_question() -> None:
    spec = DatasetSpec(path="x", prompt="q", answer="a", images="pictures")
    row = {"q": "which one?", "a": 4, "pictures": [{"bytes": b"12", "path": None}], "level": 2}
    content, answer, fields = prompt_of(row, spec)
    assert content == [{"role": "user", "content": [IMAGE, text("which one?")]}]
    assert (answer, fields) == ("4", {"level": 2})
    assert prompt_of({**row, "pictures": []}, spec)[0] == "which one?"
    with pytest.raises(DataError, match=r"row 3 has images or videos, .* drop chat: false"):
        prompt_of(row, spec.model_copy(update={"chat": False}), "rows: row 3")
    with pytest.raises(DataError, match="2 image placeholders for 1 images"):
        prompt_of({**row, "q": "<image> or <image>?"}, spec)
    messages = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, text("?")]}]
    chat = DatasetSpec(path="x", format="chat")
    content, answer, _ = prompt_of({"messages": messages, "answer": "yes"}, chat)
    assert (content, answer) == ([{"role": "user", "content": [IMAGE, text("?")]}], "yes")


def test_a_question_of_cosmos_reason1_is_asked_as_cosmos_rl_asks_it() -> None:
    pairs = {"question": "What next?", "index2ans": {"A": "stop", "B": "go", "C": None}, "answer": "B"}
    spec = DatasetSpec(path="x", format="cosmos_reason1", system="")
    content, answer, fields = prompt_of({"video": "some/where/a.mp4", "qa_pairs": pairs}, spec)
    assert answer == "B"
    assert fields == {"qa_pairs": pairs}
    assert content == [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "video"}, text(
            "What next?\n(A) stop\n(B) go"
            "\nAnswer with the option's letter from the given choices directly."
            "\nPlease answer the question in the following format: "
            "<think> your reasoning </think> <answer> your answer </answer>."
        )]},
    ]  # fmt: skip
    with pytest.raises(DataError, match="row 1: column 'qa_pairs' must have a question"):
        prompt_of({"qa_pairs": {**pairs, "answer": None}}, spec, "rows: row 1")
    with pytest.raises(DataError, match="row 1: column 'qa_pairs' must have question, index2ans"):
        prompt_of({"qa_pairs": ["A"]}, spec, "rows: row 1")


def test_check_sees_what_no_replica_could_generate_from(tmp_path: Path) -> None:
    model = tmp_path / "model"
    make_tokenizer(VISION).save_pretrained(model)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    rows = [
        {"image": name, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "1"}]}
        for name in ("a.png", "b.png")
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe: dict[str, Any] = {
        "name": "x", "kind": "rl", "model": {"path": "./model"},
        "algorithm": {"name": "grpo", "group_size": 2},
        "data": {"train": {"path": "rows.json", "format": "llava"}}, "reward": [{"name": "exact"}],
        "policy": {"steps": 1, "batch_size": 4}, "rollout": {"engine": "hf"},
    }  # fmt: skip

    def found(model_type: str = "qwen3_vl") -> str:
        (model / "config.json").write_text(json.dumps({"model_type": model_type}))
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        loaded = load_recipe(str(tmp_path / "recipe.yaml"))
        return data_findings(loaded, Site.model_validate({"name": "x"}))[0].message

    assert "row 0 has images or videos, and " in found()
    assert found().endswith("has no processor for them")
    (model / "preprocessor_config.json").write_text("{}")
    assert f"rows.json: row 1: {tmp_path}/b.png does not exist" in found()
    assert "rollout.engine hf does not generate from those of Llama 3.2 Vision" in found("mllama")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert found() == f"2 rows of {tmp_path}/rows.json"
    (model / "chat_template.jinja").write_text("{{ raise_exception('no pictures here') }}")
    assert "rows.json: row 0: the chat template of" in found()
    assert found().endswith("refuses the roles user: no pictures here")
    (model / "chat_template.jinja").unlink()
    assert "has no chat template to place them" in found()
