"""Rows from every kind of file, and the messages for rows that do not fit the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rl.data.errors import DataError
from hpc_rl.data.prompts import check_rows, completion_of, prompt_of
from hpc_rl.data.rows import load_rows
from hpc_rl.recipe.schema import DatasetSpec

ROWS = [{"question": f"What is {i} + 1?", "answer": f"It is #### {i + 1}", "level": i} for i in range(5)]
SPEC = {"prompt": "question", "answer": "answer"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("rows")
    # A blank line and text beyond ASCII: byte offsets, not character counts, find the rows.
    lines = [json.dumps(ROWS[0]) + "\n", "\n"] + [json.dumps(row) + "\n" for row in ROWS[1:]]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "rows.json").write_text(json.dumps({"version": 1, "rows": ROWS}))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    (folder / "split").mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), folder / "split" / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[2:]), folder / "split" / "train-00001-of-00002.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder / "saved"))
    return folder


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "split", "saved"])
def test_every_kind_of_file_gives_the_same_rows(files: Path, name: str) -> None:
    rows = load_rows(DatasetSpec(path=name, **SPEC), files)
    assert len(rows) == 5
    assert list(rows) == ROWS
    assert rows[3]["level"] == 3
    with pytest.raises(IndexError):
        rows[5]


def test_the_fingerprint_tells_other_content_and_other_limits_apart(files: Path, tmp_path: Path) -> None:
    spec = DatasetSpec(path="rows.jsonl", **SPEC)
    first = load_rows(spec, files)
    assert first.fingerprint == load_rows(spec, files).fingerprint
    limited = load_rows(spec.model_copy(update={"limit": 3}), files)
    assert len(limited) == 3
    text = (files / "rows.jsonl").read_text().replace("What is 4", "What is 7")
    (tmp_path / "rows.jsonl").write_text(text)
    other = load_rows(spec, tmp_path)
    assert len({first.fingerprint, limited.fingerprint, other.fingerprint}) == 3


def test_prompt_and_answer_by_column_template_and_system(files: Path) -> None:
    rows = load_rows(DatasetSpec(path="rows.jsonl", **SPEC), files)
    spec = DatasetSpec(path="rows.jsonl", **SPEC)
    assert prompt_of(rows[2], spec) == ("What is 2 + 1?", "It is #### 3", {"level": 2})
    templated = spec.model_copy(update={"template": "Q({level}): {question}\nA:"})
    assert prompt_of(rows[2], templated)[0] == "Q(2): What is 2 + 1?\nA:"
    with_system = spec.model_copy(update={"system": "Be brief."})
    assert prompt_of(rows[2], with_system)[0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 1?"},
    ]


def test_a_chat_row_is_split_before_its_last_answer() -> None:
    spec = DatasetSpec(path="x", format="chat", system="S")
    row = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
        "scan": b"\x00",
    }
    content, answer, fields = prompt_of(row, spec)
    assert answer == "d"
    assert fields == {}
    assert [m["content"] for m in content] == ["S", "a", "b", "c"]
    assert completion_of(row, spec) == (content, "d")
    with pytest.raises(DataError, match="assistant"):
        completion_of({"messages": row["messages"][:3]}, spec)


def test_bad_rows_name_file_row_and_columns(files: Path, tmp_path: Path) -> None:
    rows = load_rows(DatasetSpec(path="rows.jsonl"), files)
    with pytest.raises(DataError, match=r"rows.jsonl: row 0 has no column 'prompt'.*'question', 'answer'"):
        check_rows(rows, DatasetSpec(path="rows.jsonl"), sft=False)
    with pytest.raises(DataError, match="template names column 'nope'"):
        prompt_of(rows[0], DatasetSpec(path="x", template="{nope}", **SPEC))
    with pytest.raises(DataError, match="must be text"):
        prompt_of({"question": ["a"], "answer": "b"}, DatasetSpec(path="x", **SPEC))
    with pytest.raises(DataError, match="role 'human'"):
        prompt_of({"messages": [{"role": "human", "content": "x"}]}, DatasetSpec(path="x", format="chat"))
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\nnot json\n')
    bad = load_rows(DatasetSpec(path="bad.jsonl"), tmp_path)
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        bad[1]


def test_missing_files_splits_and_data_sets_are_named(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As in a job (HF_HUB_OFFLINE=1); without it the libraries try the network for half a minute.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nothing\.jsonl does not exist"):
        load_rows(DatasetSpec(path="nothing.jsonl"), files)
    with pytest.raises(DataError, match=r"no file for split 'test'.*train-00000"):
        load_rows(DatasetSpec(path="split", split="test"), files)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no rows"):
        load_rows(DatasetSpec(path="empty.jsonl"), tmp_path)
    with pytest.raises(DataError, match="hpc-rl fetch"):
        load_rows(DatasetSpec(path="nobody/nothing-of-that-name"), tmp_path)


def test_a_file_that_may_not_be_read_is_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", closed)  # permission bits would not stop root
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read: Permission denied"):
        load_rows(DatasetSpec(path=str(files / "rows.jsonl"), **SPEC))


def test_a_line_that_is_no_json_or_no_utf8_is_named_by_its_place(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text"\n{"text": "\xff"}\n')
    rows = load_rows(DatasetSpec(path=str(path)))
    with pytest.raises(
        DataError, match=r"rows.jsonl:2: not a JSON object: Expecting ':' delimiter at character \d+$"
    ):
        rows[1]
    with pytest.raises(DataError, match=r"rows.jsonl:3: not UTF-8: byte 0xff at position 11 of the line"):
        rows[2]


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match=r"Did you mean '.*/chats.jsonl'\?"):
        load_rows(DatasetSpec(path=f"{tmp_path}/chat.jsonl"))
    with pytest.raises(DataError, match=r"does not exist$"):
        load_rows(DatasetSpec(path=f"{tmp_path}/other.parquet"))
