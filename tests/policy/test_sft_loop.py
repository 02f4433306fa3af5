"""The SFT loop around the step: validation, averages, guards, rates; all of it the same after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpc_rl.bus.messages import TrainStep
from hpc_rl.bus.server import RedisServer
from hpc_rl.data.errors import DataError
from hpc_rl.plan.schema import Mesh
from hpc_rl.policy.trainer import NonFiniteError, SpikeError
from hpc_rl.recipe.schema import Recipe
from tests.policy.sft_runs import (
    SGD,
    apart,
    averages,
    equal,
    fresh,
    full_recipe,
    one_process,
    parameters,
    save,
    sharded,
    start,
    train,
    with_eval,
)  # fmt: skip
from tests.tiny_models import save_model, save_tokenizer
from tests.training import make_recipe

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


@pytest.mark.parametrize("policy", [{}, {"batch_tokens": 48}], ids=["batch_size", "batch_tokens"])
def test_interrupted_twice_with_everything_on_it_is_bit_equal(
    policy: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    recipe = full_recipe(tmp_path, tiny_model, **policy)
    _, whole = fresh(tmp_path / "whole", recipe)
    losses = train(whole, 1, 8)
    expected = (parameters(whole), averages(whole), whole.evaluate(8), list(whole.guard.losses))
    whole.close()

    run, trainer = fresh(tmp_path / "cut", recipe)
    seen: list[float] = []
    for attempt, (first, last) in enumerate(((1, 3), (4, 5)), 2):
        seen += train(trainer, first, last)
        trainer.evaluate(last)
        save(trainer, run, last)
        train(trainer, last + 1, last + 2)  # lost with the process
        trainer.close()
        torch.manual_seed(attempt)
        trainer = start(run, recipe, attempt, step=last)
    seen += train(trainer, 6, 8)
    assert seen == losses
    assert equal(parameters(trainer), expected[0])
    assert equal(averages(trainer), expected[1])
    assert trainer.evaluate(8) == expected[2]
    assert list(trainer.guard.losses) == expected[3]
    trainer.close()


@pytest.mark.redis
@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2), Mesh(tp=2)], ids=["dp_shard", "tp"])
def test_two_ranks_validate_and_average_as_one_and_resume_on_one(
    mesh: Mesh, tmp_path: Path, redis_server: RedisServer
) -> None:
    (tmp_path / "model").mkdir()
    model = save_tokenizer(save_model(tmp_path / "model", "qwen2", num_key_value_heads=2))
    optimizer = {**SGD, "groups": [{"match": "norm", "lr": 0.1}]}
    recipe = with_eval(
        make_recipe(tmp_path, model, steps=6, optimizer=optimizer, ema={"decay": 0.5, "start_step": 1})
    )
    one = one_process(tmp_path / "one", recipe, cut=3)
    run, two = sharded(tmp_path / "two", recipe, redis_server, last=6, cut=3, mesh=mesh)
    assert apart(two["losses"], one["losses"]) <= 1e-5
    assert apart(two["evals"], one["evals"]) <= 1e-5
    assert apart(two["averages"], one["averages"]) <= 1e-5

    again = start(run, recipe, attempt=2, step=3)
    assert apart(train(again, 4, 6), one["losses"][3:]) <= 1e-5
    assert again.evaluate(6)["eval/loss"] == pytest.approx(one["evals"][2], abs=1e-5)
    again.close()


def test_the_validation_loss_is_the_loss_and_validating_changes_nothing(
    tiny_model: Path, tmp_path: Path
) -> None:
    recipe = with_eval(make_recipe(tmp_path, tiny_model, batch_size=10, steps=4))  # a step is all ten rows
    _, plain = fresh(tmp_path / "plain", recipe)
    losses = train(plain, 1, 4)
    expected = parameters(plain)
    plain.close()
    _, trainer = fresh(tmp_path / "evaluated", recipe)
    rng = torch.get_rng_state()
    for step in range(4):
        found = trainer.evaluate(step)
        assert torch.equal(torch.get_rng_state(), rng)
        metrics = trainer.train_step(TrainStep(step + 1))
        assert found["eval/loss"] == pytest.approx(metrics["train/loss"], abs=1e-5)
        assert found["eval/tokens"] == metrics["train/tokens"]
        assert found["eval/perplexity"] == pytest.approx(math.exp(found["eval/loss"]))
        assert metrics["train/loss"] == losses[step]
    assert equal(parameters(trainer), expected)
    with pytest.raises(ValueError, match="evaluation at step 2 was commanded after step 4"):
        trainer.evaluate(2)
    trainer.close()


def test_averages_are_validated_and_exported_and_training_goes_on_from_the_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    optimizer = {"lr": 3e-3}
    recipe = with_eval(make_recipe(tmp_path, tiny_model, ema={"decay": 0.9}, optimizer=optimizer))
    run, trainer = fresh(tmp_path / "averaged", recipe)
    reference = {name: value.double() for name, value in parameters(trainer).items()}
    for step in range(1, 5):
        trainer.train_step(TrainStep(step))
        for name, value in parameters(trainer).items():
            reference[name] = 0.9 * reference[name] + 0.1 * value.double()
    found = averages(trainer)
    assert max(float((found[n].double() - v).abs().max()) for n, v in reference.items()) < 1e-6
    weights = parameters(trainer)
    loss = trainer.evaluate(4)["eval/loss"]
    assert equal(parameters(trainer), weights)
    assert equal(averages(trainer), found)
    trainer.export(4, "final", run.safetensors / "final")
    list(trainer.finish())
    assert equal(parameters(trainer), weights)
    exported = load_file(run.safetensors / "final" / "model.safetensors")
    assert exported
    assert all(torch.equal(exported[name], found[name]) for name in exported)
    trainer.close()
    # The loss is that of the averages: a run that starts from the export begins with it.
    elsewhere = recipe.model_dump()
    elsewhere["model"]["path"] = str(run.safetensors / "final")
    _, second = fresh(tmp_path / "second", Recipe.model_validate(elsewhere))
    assert second.evaluate(0)["eval/loss"] == pytest.approx(loss, abs=1e-5)
    second.close()


def test_a_loss_that_stays_high_stops_before_the_weights_change_and_names_the_batch(
    tiny_model: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        tmp_path, tiny_model, optimizer={"lr": 0.0}, guard={"spike": 1.5, "window": 2, "patience": 2}
    )
    run, trainer = fresh(tmp_path / "run", recipe)
    train(trainer, 1, 2)
    save(trainer, run, 2)
    with torch.no_grad():  # what a bad update would have done
        trainer.model.module.model.embed_tokens.weight.mul_(100)
    train(trainer, 3, 3)
    before = parameters(trainer)
    words = (
        r"^step 4: the loss [\d.]+ is more than policy.guard.spike = 1.5 times the median [\d.]+ of the "
        r"last 2 steps, 2 steps in a row; samples 12-15 \(rows [\d, -]+ of .*rows.jsonl\); the newest "
        r"complete checkpoint is .*step_00000002$"
    )
    with pytest.raises(SpikeError, match=words):
        trainer.train_step(TrainStep(4))
    assert equal(parameters(trainer), before)
    trainer.close()


def test_a_nan_stops_before_the_weights_change_and_names_rows(tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model, micro_batch_tokens=None, micro_batch_size=1)
    _, trainer = fresh(tmp_path / "run", recipe)
    train(trainer, 1, 1)
    assert trainer.sft is not None
    bad = trainer.sft.samples(2)[1]
    with torch.no_grad():
        weight = trainer.model.module.model.embed_tokens.weight
        only = set(bad.token_ids) - {t for s in trainer.sft.samples(2) if s is not bad for t in s.token_ids}
        assert only, "the rows have tokens of their own"
        weight[sorted(only)[0]] = float("inf")
    before = parameters(trainer)
    row = trainer.sft.row(bad.ordinal)
    # The head is tied to the embedding: every row meets the bad weight there.
    with pytest.raises(NonFiniteError, match=rf"^step 2: the loss is not finite; samples 4-7 \(rows .*{row}"):
        trainer.train_step(TrainStep(2))
    assert equal(parameters(trainer), before)
    trainer.close()


def test_rates_and_times_are_reported_and_the_profile_is_written(tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model, profile={"start": 2, "steps": 2})
    run, trainer = fresh(tmp_path / "run", recipe)
    metrics = {step: trainer.train_step(TrainStep(step)) for step in range(1, 5)}
    trainer.close()
    times = [metrics[1][f"time/{name}_s"] for name in ("data", "forward_backward", "reduce", "optimizer")]
    assert all(seconds > 0 for seconds in times)
    rate = metrics[1]["train/input_tokens"] / metrics[1]["train/tokens_per_s"]
    assert sum(times) == pytest.approx(rate, rel=0.05)
    assert metrics[1]["train/samples_per_s"] == pytest.approx(4 / rate)
    assert "train/mfu" not in metrics[1]  # a CPU has no known peak
    (trace,) = (run.root / "profile").iterdir()
    assert trace.name == "rank_0_steps_2-3.json"
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)


def test_validation_rows_of_which_nothing_is_left_are_an_error(tiny_model: Path, tmp_path: Path) -> None:
    """A loss of 0 would be the best checkpoint for good."""
    recipe = make_recipe(tmp_path, tiny_model, max_length=8)
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text('{"prompt": "1+1+1+1+1+1=", "completion": "6"}\n' * 5)
    data = recipe.data.model_dump() | {"eval": {"path": str(held_out), "format": "prompt_completion"}}
    _, trainer = fresh(tmp_path, Recipe.model_validate(recipe.model_dump() | {"data": data}))
    with pytest.raises(DataError, match=r"data\.eval, or data\.holdout .* policy\.max_length"):
        trainer.evaluate(0)
    trainer.close()
