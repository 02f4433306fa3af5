"""DPO in the real trainer: it learns from where its reference is, on any ranks, also after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rl.algorithms.dpo import Pairs
from hpc_rl.bus.messages import TrainStep
from hpc_rl.bus.server import RedisServer
from hpc_rl.data.errors import DataError
from hpc_rl.policy.batching import pack_samples
from hpc_rl.recipe.schema import Recipe
from hpc_rl.types import TrainSample
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
    with_eval,
)
from tests.tiny_vlms import save_vlm
from tests.training import TEXTS, make_recipe

pytestmark = [pytest.mark.torch, pytest.mark.redis]
torch.set_num_threads(1)


def pair_recipe(folder: Path, model: Path, algorithm: dict[str, Any] | None = None, **policy: Any) -> Recipe:
    """Ten additions: the sum was chosen, and one too many, written longer, was rejected."""
    sums = [text.split("=", 1) for text in TEXTS]
    rows = [{"prompt": a, "chosen": b, "rejected": f"{int(b) + 1}+0"} for a, b in sums]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe(folder, model, **{"micro_batch_tokens": 64, **policy}).model_dump()
    recipe |= {
        "kind": "preference",
        "data": {"train": {"path": str(path), "format": "preference"}},
        "algorithm": {"name": "dpo", "beta": 0.5, **(algorithm or {})},
    }
    return with_eval(Recipe.model_validate(recipe))


def test_it_learns_from_where_the_reference_is(tiny_model: Path, tmp_path: Path) -> None:
    _, trainer = fresh(tmp_path, pair_recipe(tmp_path, tiny_model, steps=12))
    before = trainer.evaluate(0)
    # Equal to its reference, bit for bit: no pair is decided.
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert (before["eval/accuracy"], before["eval/margin"], before["eval/pairs"]) == (0, 0, 10)
    first = trainer.train_step(TrainStep(1))
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["train/kl_reference"], first["train/sequences"]) == (0, 8)  # of 4 pairs
    last = [trainer.train_step(TrainStep(step)) for step in range(2, 13)][-1]
    after = trainer.evaluate(12)
    assert after["eval/accuracy"] == 1
    assert after["eval/loss"] < 0.3
    assert after["eval/margin"] > 1
    assert last["train/kl_reference"] > 0
    assert last["train/rewards_chosen"] - last["train/rewards_rejected"] == pytest.approx(
        last["train/margin"]
    )
    trainer.close()


@pytest.mark.parametrize(
    ("algorithm", "first"),
    [
        ({"loss": "ipo"}, 1.0),  # (0 - 1 / (2 * 0.5))^2
        ({"loss": "hinge"}, 1.0),
        ({"reference": False, "length_normalize": True, "gamma": 0.5, "beta": 2.0}, None),
    ],
)
def test_the_other_losses_learn_as_well(
    tiny_model: Path, tmp_path: Path, algorithm: dict[str, Any], first: float | None
) -> None:
    _, trainer = fresh(tmp_path, pair_recipe(tmp_path, tiny_model, algorithm, steps=10))
    losses = train(trainer, 1, 10)
    assert first is None or losses[0] == pytest.approx(first, abs=1e-6)
    assert (trainer.reference is None) == (algorithm.get("reference") is False)
    assert losses[-1] < 0.6 * losses[0]
    assert trainer.evaluate(10)["eval/accuracy"] == 1
    trainer.close()


def test_adapters_are_held_to_the_model_without_them(tiny_model: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(tmp_path, tiny_model, steps=10, optimizer={"lr": 2e-2}).model_dump()
    recipe["model"]["lora"] = {"r": 4, "alpha": 8}
    _, trainer = fresh(tmp_path, Recipe.model_validate(recipe))
    losses = train(trainer, 1, 10)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.4
    trainer.close()


def test_packing_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """One forward for all pairs, one for each, and batches by tokens in rows of one pair."""
    found = []
    for number, policy in enumerate([{"micro_batch_tokens": 512}, {"micro_batch_size": 1}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        algorithm = {"nll_weight": 0.5, "label_smoothing": 0.1}
        options = {"steps": 3, "optimizer": SGD, **policy}
        found.append(one_process(folder, pair_recipe(folder, tiny_model, algorithm, **options)))
    assert apart(found[0]["losses"], found[1]["losses"]) < 1e-6
    assert apart(found[0]["parameters"], found[1]["parameters"]) < 1e-6
    assert apart(found[0]["evals"], found[1]["evals"]) < 1e-6


def test_token_batches_end_with_the_last_pair(tiny_model: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(tmp_path, tiny_model, steps=None, epochs=1, batch_tokens=64)
    _, trainer = fresh(tmp_path, recipe)
    total, seen = trainer.total_steps, 0.0
    for step in range(1, total + 1):
        seen += trainer.train_step(TrainStep(step))["train/sequences"]
    assert total > 1
    assert seen == 20
    trainer.close()


def test_two_ranks_are_one(tiny_model: Path, tmp_path: Path, redis_server: RedisServer) -> None:
    """Sharded policy and sharded reference: losses, validation and weights to 1e-5."""
    recipe = pair_recipe(tmp_path, tiny_model, {"nll_weight": 0.2}, steps=4, optimizer=SGD)
    one = one_process(tmp_path / "one", recipe)
    _, two = sharded(tmp_path / "two", recipe, redis_server, 4, 2)
    assert apart(one["losses"], two["losses"]) < 1e-5
    assert apart(one["evals"], two["evals"]) < 1e-5
    assert apart(one["parameters"], two["parameters"]) < 1e-5


def test_a_resume_goes_on_bit_by_bit(tiny_model: Path, tmp_path: Path) -> None:
    """The reference is the model that the run began with, also in the second attempt."""
    recipe = pair_recipe(tmp_path, tiny_model, steps=6)
    run, trainer = fresh(tmp_path, recipe)
    train(trainer, 1, 3)
    save(trainer, run, 3)
    losses, last = train(trainer, 4, 6), parameters(trainer)
    trainer.close()
    again = start(run, recipe, attempt=2, step=3)
    assert train(again, 4, 6) == losses
    assert equal(parameters(again), last)
    again.close()


def test_validation_without_a_pair_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    recipe = pair_recipe(tmp_path, tiny_model).model_dump()
    path = tmp_path / "alike.jsonl"
    path.write_text(json.dumps({"prompt": "1", "chosen": "2", "rejected": "2"}) + "\n")
    recipe["data"]["eval"]["path"] = str(path)
    _, trainer = fresh(tmp_path, Recipe.model_validate(recipe))
    with pytest.raises(DataError, match="validation rows"):
        trainer.evaluate(0)
    trainer.close()


def test_a_pair_beside_a_blank_picture_keeps_its_numbers() -> None:
    """A forward of a model that needs a picture has a sequence that is no pair, and counts as none."""
    picture = {"pixel_values": torch.ones(1, 3)}
    blank = TrainSample(-1, -1, [1, 2], [0, 0], [], [], media=picture)
    pair = TrainSample(4, 0, [5, 6, 7, 5, 8], [0, 1, 1, 0, 1], [], [], split=3)
    batch = pack_samples([blank, pair], 1.0, torch.device("cpu"))
    assert batch.row.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert batch.row.keep.tolist() == [2, 3, 5]
    assert batch.row.media is not None
    assert [one is None for one in batch.row.media] == [False, True, True]
    assert (batch.tokens.sequence.tolist(), batch.tokens.num_sequences) == ([2, 2, 3], 4)
    log_probs = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    found = Pairs.of(batch.tokens, log_probs, reference=False)
    assert found.current.tolist() == [[0, 0], [-3, -4]]
    assert found.mask.tolist() == [0, 1]
    bad = TrainSample(4, 0, [5, 6, 7, 5, 8], [0, 1, 1, 1, 1], [], [], split=3)
    with pytest.raises(ValueError, match=r"sample 4\.0: nothing predicts the first token"):
        pack_samples([bad], 1.0, torch.device("cpu"))


def test_text_pairs_on_a_model_that_needs_pictures(tmp_path: Path, redis_server: RedisServer) -> None:
    """Each rank reads its own rows then; the pairs are counted over all of them."""
    recipe = pair_recipe(tmp_path, save_vlm(tmp_path / "model", "mllama"), steps=3, optimizer=SGD)
    one = one_process(tmp_path / "one", recipe, cut=1)
    assert one["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert one["losses"][2] < one["losses"][0]
    _, two = sharded(tmp_path / "two", recipe, redis_server, 3, 1)
    assert apart(one["losses"], two["losses"]) < 1e-5
    assert apart(one["evals"], two["evals"]) < 1e-5
