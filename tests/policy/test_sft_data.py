"""SFT's data by position: any number of ranks, threads or interruptions makes the same steps."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rl.bus.messages import TrainStep
from hpc_rl.data.errors import DataError
from hpc_rl.data.rows import load_rows
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.policy.sft_data import SftData
from hpc_rl.policy.sft_open import length_limit, open_sources
from hpc_rl.policy.sft_rows import RowSource, row_source
from hpc_rl.recipe.schema import DatasetSpec, Policy
from hpc_rl.run.paths import RunDir
from hpc_rl.types import TrainSample
from tests.data.chat_templates import ALL, make_tokenizer
from tests.policy.sft_runs import equal, fresh, parameters, save, start, train
from tests.training import make_context, make_recipe

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
WORDS = "the answer is four and the question was what two and two are " * 8


def write(folder: Path, count: int = 60, name: str = "rows.jsonl") -> DatasetSpec:
    """Rows of very different lengths."""
    rows = [{"prompt": f"{k}:", "completion": WORDS[: 3 + (k * 37) % 300]} for k in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetSpec(path=str(folder / name), format="prompt_completion")


def make(spec: DatasetSpec, ranks: int = 1, workers: int = 0, seed: int = 5, **policy: Any) -> SftData:
    options = {"batch_size": 8, "micro_batch_tokens": 128, "steps": 30, **policy}
    source = row_source(load_rows(spec), spec, make_tokenizer(), options.get("max_length"))
    return SftData(source, Policy(**options), seed, ranks, workers=workers)


def ids(samples: list[TrainSample]) -> list[tuple[int, int]]:
    return [(sample.ordinal, sample.sample) for sample in samples]


TOKENS = {"batch_tokens": 512, "micro_batch_tokens": 128}


@pytest.mark.parametrize("policy", [{}, TOKENS, {"micro_batch_size": 2, "micro_batch_tokens": None}])
def test_the_steps_do_not_depend_on_ranks_or_threads(tmp_path: Path, policy: dict[str, Any]) -> None:
    spec = write(tmp_path)
    one = make(spec, **policy)
    expected = [ids(one.samples(step)) for step in range(1, 13)]
    assert len({tuple(step) for step in expected}) == 12
    for ranks, workers in ((2, 0), (3, 2), (1, 3)):
        data = make(spec, ranks, workers, **policy)
        for step, wanted in enumerate(expected, 1):
            parts = [data.micro_batches(step, rank) for rank in range(ranks)]
            assert len({len(micro_batches) for micro_batches, _ in parts}) == 1
            dealt = [s for micro_batches, _ in parts for samples in micro_batches for s in samples]
            assert sorted(ids(dealt)) == sorted(wanted)
            assert {tokens for _, tokens in parts} == {sum(sum(s.loss_mask) for s in dealt)}
        data.close()


@pytest.mark.parametrize("policy", [{}, TOKENS])
def test_epochs_see_every_row_exactly_so_often(tmp_path: Path, policy: dict[str, Any]) -> None:
    data = make(write(tmp_path), steps=None, epochs=2, **policy)
    seen = [key for step in range(1, data.total_steps + 1) for key in ids(data.samples(step))]
    assert sorted(seen) == [(ordinal, 0) for ordinal in range(120)]
    assert all(data.samples(step) for step in [data.total_steps])
    assert data.metrics()["data/epoch"] == 2.0


def test_token_batches_are_full(tmp_path: Path) -> None:
    data = make(write(tmp_path, 300), **TOKENS)
    fill = []
    for step in range(1, 41):
        micro_batches, _ = data.micro_batches(step, 0)
        assert len(micro_batches) == 4
        lengths = [sum(len(s.token_ids) for s in samples) for samples in micro_batches]
        fill.append(sum(lengths) / 512)
    assert sum(fill) / len(fill) > 0.97


@pytest.mark.parametrize("policy", [{}, TOKENS])
@pytest.mark.parametrize("epochs", [None, 3])
def test_a_saved_position_goes_on_exactly_there(
    tmp_path: Path, policy: dict[str, Any], epochs: int | None
) -> None:
    spec = write(tmp_path)
    if epochs:
        policy = {**policy, "steps": None, "epochs": epochs}
    whole = make(spec, **policy)
    total = whole.total_steps
    expected = [ids(whole.samples(step)) for step in range(1, total + 1)]
    for cut in (1, 4, 7):
        first = make(spec, 2, 2, **policy)
        for step in range(1, cut + 1):
            first.micro_batches(step, 0)
        saved = first.state()
        first.samples(cut + 1)  # lost with the process
        first.close()
        second = make(spec, 3, **policy)
        second.load_state(saved)
        assert second.total_steps == total
        assert second.state() == saved
        assert [ids(second.samples(step)) for step in range(cut + 1, total + 1)] == expected[cut:]


def test_a_changed_batch_goes_on_with_the_next_row(tmp_path: Path) -> None:
    spec = write(tmp_path)
    first = make(spec, steps=None, epochs=1)
    seen = [key for step in (1, 2, 3) for key in ids(first.samples(step))]
    second = make(spec, steps=None, epochs=1, batch_size=5)
    second.load_state(first.state())
    assert second.total_steps == 3 + 8  # 36 rows are left
    for step in range(4, 12):
        seen += ids(second.samples(step))
    assert sorted(seen) == [(ordinal, 0) for ordinal in range(60)]


def test_a_position_in_other_data_is_refused(tmp_path: Path) -> None:
    spec = write(tmp_path)
    data = make(spec)
    data.samples(1)
    other = make(write(tmp_path, 61, "other.jsonl"))
    with pytest.raises(DataError, match=r"trained on other rows than .*other\.jsonl has now .*rows\.jsonl"):
        other.load_state(data.state())
    with pytest.raises(DataError, match="in the order of seed 5"):
        make(spec, seed=6).load_state(data.state())
    tokens = make(spec, **TOKENS)
    tokens.samples(1)
    with pytest.raises(DataError, match=r"made with policy\.batch_tokens"):
        make(spec).load_state(tokens.state())


def test_a_bad_row_fails_its_own_step_and_no_other(tmp_path: Path) -> None:
    spec = write(tmp_path, 24)
    text = (tmp_path / "rows.jsonl").read_text().replace('"17:"', "17")
    (tmp_path / "rows.jsonl").write_text(text.replace('"completion"', '"complete"', 0))
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[17] = '{"prompt": "17:"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    for workers in (0, 2):
        data = make(spec, workers=workers)
        bad = next(step for step in (1, 2, 3) if 17 in [data.row(o) for o in range(8 * step - 8, 8 * step)])
        for step in range(1, bad):
            data.samples(step)
        with pytest.raises(DataError, match=r"rows\.jsonl: row 17 has no column 'completion'"):
            data.samples(bad)
        data.close()


def test_rows_are_made_ahead_by_threads_that_end(tmp_path: Path) -> None:
    spec = write(tmp_path)
    plain, made = row_source(load_rows(spec), spec, make_tokenizer(), None), []

    def encoder() -> Any:
        encode = plain.encoder()

        def note(index: int) -> Any:
            made.append(threading.current_thread().name)
            return encode(index)

        return note

    source = RowSource(plain.rows, spec, encoder)
    data = SftData(source, Policy(batch_size=8, steps=9), 5, 1, workers=2)
    data.samples(1)
    data.samples(2)
    data.close()
    assert len(made) >= 16
    assert all(name.startswith("hpc-rl-data") for name in made)
    assert not [t for t in threading.enumerate() if t.name.startswith("hpc-rl-data")]


def test_rows_that_fork_or_are_dropped_are_counted(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d"), ("assistant", "e")]
    long = [("user", WORDS), ("assistant", "b")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in (turns, long, turns)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DatasetSpec(
        path=str(tmp_path / "chat.jsonl"), format="chat", repair=["merge_roles"], shuffle=False
    )
    source = row_source(load_rows(spec), spec, make_tokenizer(ALL["qwen3"]), 64)
    policy = Policy(batch_size=3, epochs=2, max_length=64, micro_batch_tokens=64)
    for ranks in (1, 2):
        data = SftData(source, policy, 0, ranks)
        for rank in range(ranks):
            data.micro_batches(1, rank)
        assert ids(data.samples(1)) == [(0, 0), (0, 1), (2, 0), (2, 1)]
        counted = {"data/repaired": 2.0, "data/truncated": 0.0, "data/dropped": 1.0, "data/epoch": 1.0}
        counted["data/truncated"] = data.metrics()["data/truncated"]
        assert data.metrics() == counted
        data.micro_batches(2, 0)
        assert data.metrics()["data/repaired"] == 4.0


def test_steps_of_which_nothing_is_left_end_the_run(tiny_model: Path, tmp_path: Path) -> None:
    """One is skipped and counted; a whole epoch of them, or ten in a row, is a mistake somewhere."""
    recipe = make_recipe(tmp_path, tiny_model, max_length=2)  # ten rows in steps of 4
    _, trainer = fresh(tmp_path / "a", recipe)
    for step in (1, 2):
        found = trainer.train_step(TrainStep(step))
        assert (found["train/skipped"], found["data/dropped"]) == (1.0, 4.0 * step)
    with pytest.raises(
        DataError, match=r"3 steps .*12 dropped .* policy\.max_length \(2\) .*data\.train\.overlong"
    ):
        trainer.train_step(TrainStep(3))
    trainer.close()

    data = make(write(tmp_path), max_length=2, batch_size=4)
    for step in range(1, 10):
        assert data.micro_batches(step, 0)[1] == 0
        assert data.skipped(step)["data/dropped"] == 4.0 * step
    data.micro_batches(10, 0)
    with pytest.raises(DataError, match=r"10 steps in a row \(40 rows"):
        data.skipped(10)


def test_skipped_steps_with_trained_ones_between_them_go_on(tmp_path: Path) -> None:
    """Most rows are too long and dropped, but never ten one after the other."""
    spec = write(tmp_path).model_copy(update={"overlong": "drop", "shuffle": False})
    data = make(spec, max_length=40, batch_size=1, steps=240)
    skipped = 0
    for step in range(1, 241):
        if data.micro_batches(step, 0)[1] == 0:
            data.skipped(step)
            skipped += 1
    assert 60 < skipped < 240


def test_token_batches_of_rows_that_are_all_dropped_end(tmp_path: Path) -> None:
    spec = write(tmp_path)
    with pytest.raises(DataError, match=r"a whole epoch \(60 rows\) has no token"):
        make(spec, max_length=2, **TOKENS).samples(1)
    with pytest.raises(DataError, match="all 60 rows have no token"):
        assert make(spec, max_length=2, **TOKENS, steps=None, epochs=1).total_steps


def test_a_sequence_that_waited_and_is_not_made_any_more_is_named(tmp_path: Path) -> None:
    spec = write(tmp_path).model_copy(update={"overlong": "drop"})
    data = make(spec, **TOKENS)
    data.samples(1)
    saved = data.state()
    assert json.loads(saved)["waiting"]
    with pytest.raises(DataError, match=r"sequence 0 of row \d+ waited"):
        make(spec, max_length=8, **TOKENS).load_state(saved)


def test_holdout_rows_are_never_trained_on(tmp_path: Path) -> None:
    spec = write(tmp_path)
    rows = load_rows(spec)
    rest, held = rows.split(0.2, seed=3)
    assert (len(rest), len(held)) == (48, 12)
    numbers = [part.number(k) for part in (rest, held) for k in range(len(part))]
    assert sorted(numbers) == list(range(60))
    assert [row["prompt"] for row in held] == [f"{held.number(k)}:" for k in range(12)]
    assert held.where(3).endswith(f"rows.jsonl: row {held.number(3)}")
    again = rows.split(12, seed=3)[1]
    assert [again.number(k) for k in range(12)] == [held.number(k) for k in range(12)]
    assert again.fingerprint == held.fingerprint != rest.fingerprint
    other = rows.split(0.2, seed=4)[1]
    assert [other.number(k) for k in range(12)] != [held.number(k) for k in range(12)]
    for bad in (0.001, 60, 100):
        with pytest.raises(DataError, match=r"data\.holdout"):
            rows.split(bad, seed=3)


def test_validation_is_every_row_once_in_order_on_any_ranks(tmp_path: Path) -> None:
    train, held = write(tmp_path), write(tmp_path, 150, "eval.jsonl")
    source, other = (row_source(load_rows(s), s, make_tokenizer(), None) for s in (train, held))
    policy = Policy(batch_size=8, micro_batch_tokens=512, steps=3)
    seen = []
    for ranks, workers in ((1, 0), (3, 2)):
        data = SftData(source, policy, 5, ranks, held_out=other, workers=workers)
        assert data.eval_rows == 150
        parts = [list(data.eval_micro_batches(rank)) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        seen.append(sorted(s.ordinal for part in parts for samples in part for s in samples))
        assert parts == [list(data.eval_micro_batches(rank)) for rank in range(ranks)]
        data.close()
    assert seen[0] == seen[1] == list(range(150))


def test_a_run_of_token_batches_resumes_bit_equal_from_its_checkpoint(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The position travels with the tensors, other data are refused by the trainer as well."""
    policy = {"batch_tokens": 32, "micro_batch_tokens": 16, "steps": None, "epochs": 3}
    recipe = make_recipe(tmp_path, tiny_model, **policy)
    _, whole = fresh(tmp_path / "a", recipe)
    total = whole.total_steps
    losses = train(whole, 1, total)
    expected = parameters(whole)
    whole.close()

    run, first = fresh(tmp_path / "b", recipe)
    train(first, 1, 3)
    save(first, run, 3)
    first.close()
    second = start(run, recipe, attempt=2, step=3)
    assert second.total_steps == total
    assert train(second, 4, total) == losses[3:]
    assert equal(parameters(second), expected)
    second.close()

    Path(recipe.data.train.path).write_text('{"prompt": "1+1=", "completion": "3"}\n')
    third = Fsdp2Trainer(make_context(run, recipe, attempt=3))
    with pytest.raises(DataError, match="the checkpoint was trained on other rows"):
        third.load()
    third.close()


@pytest.mark.parametrize(
    ("config", "options", "limit"),
    [
        ({"max_position_embeddings": 24}, {}, 24),
        ({"max_position_embeddings": 24}, {"max_length": 16}, 16),
        ({"max_position_embeddings": 9, "text_config": {"max_position_embeddings": 24}}, {}, 24),
        ({}, {}, None),
    ],
)
def test_without_max_length_a_row_ends_with_the_models_positions(
    tmp_path: Path, config: dict[str, Any], options: dict[str, Any], limit: int | None
) -> None:
    """A row without end would hold the run for hours, or kill it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    recipe = make_recipe(tmp_path, tmp_path / "model", **options)
    recipe.data.train = write(tmp_path)
    assert length_limit(recipe) == limit
    run = RunDir.create(tmp_path / "runs", "tiny", run_id="one")
    rows, _ = open_sources(recipe, run, make_tokenizer())
    encode = rows.encoder()
    longest = max(len(one.token_ids) for index in range(60) for one in encode(index).sequences)
    assert longest == limit if limit is not None else longest > 24
