"""SFT: it learns, resumes bit-equal, and does not depend on how it is sharded or packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_rl.bus.server import RedisServer
from hpc_rl.data.rows import load_rows
from hpc_rl.models.hf.folder import load_tokenizer
from hpc_rl.policy.sft_data import SftData
from hpc_rl.policy.sft_rows import row_source
from tests.policy.sft_runs import (
    SGD,
    apart,
    equal,
    fresh,
    one_process,
    parameters,
    save,
    sharded,
    start,
    train,
)  # fmt: skip
from tests.training import make_recipe

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model)
    whole = one_process(tmp_path / "whole", recipe)
    losses = whole["losses"]
    assert losses[-1] < losses[0] - 0.3  # it learns something at all

    run, first = fresh(tmp_path / "cut", recipe)
    before = train(first, 1, 3)
    save(first, run, 3)
    train(first, 4, 5)  # lost with the process
    first.close()
    (run.checkpoint(5) / "policy").mkdir(parents=True)  # a save that was under way does not count
    torch.manual_seed(999)

    second = start(run, recipe, attempt=2, step=3)
    assert before + train(second, 4, 8) == losses
    assert equal(parameters(second), whole["parameters"])
    second.close()


def test_the_packing_does_not_change_the_training(tiny_model: Path, tmp_path: Path) -> None:
    base = {"steps": 3, "optimizer": SGD}
    packed = one_process(tmp_path / "a", make_recipe(tmp_path, tiny_model, **base))
    alone = {"micro_batch_tokens": None, "micro_batch_size": 1}
    other = one_process(tmp_path / "b", make_recipe(tmp_path, tiny_model, **base, **alone))
    assert apart(packed["losses"], other["losses"]) <= 1e-5
    assert apart(packed["parameters"], other["parameters"]) <= 1e-5


@pytest.mark.redis
def test_two_ranks_equal_one_process_and_their_checkpoint_resumes_on_one(
    tiny_model: Path, tmp_path: Path, redis_server: RedisServer
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, steps=6, optimizer=SGD)
    one = one_process(tmp_path / "one", recipe)
    run, two = sharded(tmp_path / "two", recipe, redis_server, last=6, cut=3)
    assert apart(one["losses"], two["losses"]) <= 1e-5
    assert apart(one["parameters"], two["parameters"]) <= 1e-5

    trainer = start(run, recipe, attempt=2, step=3)
    rest = train(trainer, 4, 6)
    trainer.close()
    assert apart(one["losses"][3:], rest) <= 1e-5


def make_data(tiny_model: Path, folder: Path, **policy: object) -> SftData:
    recipe = make_recipe(folder, tiny_model, **policy)
    rows = load_rows(recipe.data.train)
    spec, tokenizer = recipe.data.train, load_tokenizer(recipe.model)
    return SftData(row_source(rows, spec, tokenizer, recipe.policy.max_length), recipe.policy, recipe.seed, 2)


def test_batches_are_a_function_of_seed_and_step(tiny_model: Path, tmp_path: Path) -> None:
    data, again = (make_data(tiny_model, tmp_path, steps=20) for _ in range(2))
    assert data.samples(7) == again.samples(7)
    drawn = [sample.ordinal for step in range(1, 6) for sample in data.samples(step)]
    assert drawn == list(range(20))
    parts = [data.micro_batches(4, rank) for rank in range(2)]
    assert len(parts[0][0]) == len(parts[1][0])
    assert parts[0][1] == parts[1][1] == sum(sum(s.loss_mask) for s in data.samples(4))
    dealt = [s.ordinal for micro_batches, _ in parts for micro in micro_batches for s in micro]
    assert sorted(dealt) == [12, 13, 14, 15]


def test_epochs_see_every_row_exactly_once(tiny_model: Path, tmp_path: Path) -> None:
    data = make_data(tiny_model, tmp_path, steps=None, epochs=2, batch_size=3)
    assert data.total_steps == 7  # 20 rows in threes
    texts = [tuple(s.token_ids) for step in range(1, 8) for s in data.samples(step)]
    assert len(texts) == 20
    assert all(texts.count(text) == 2 for text in texts)


def test_long_sequences_are_cut(tiny_model: Path, tmp_path: Path) -> None:
    data = make_data(tiny_model, tmp_path, max_length=4)
    assert max(len(s.token_ids) for s in data.samples(1)) == 4
    assert all(len(s.token_ids) == len(s.loss_mask) for s in data.samples(1))
