"""The reference model: what the policy began with, beside it, without adapters, or as it was a while ago."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rl.bus.messages import MicroBatch, TrainStep
from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.models.base import ModelError
from hpc_rl.policy.batching import pack_samples
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.policy.reference import AdaptersOff, SecondModel
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from hpc_rl.types import TrainSample
from tests.tiny_models import save_model
from tests.training import make_context, make_plan, make_recipe, make_run

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
LORA = {"model": {"lora": {"r": 4}}}


def recipe_of(folder: Path, path: Path, **changes: Any) -> Recipe:
    """GRPO with a penalty; `reference` and `algorithm` are those sections, `model` goes into that section."""
    plain = make_recipe(folder, path, steps=20, optimizer={"lr": 1e-2, "weight_decay": 0.0}).model_dump()
    plain["policy"]["reference"] |= changes.get("reference", {})
    plain["model"] |= changes.get("model", {})
    algorithm = {"name": "grpo", "kl_beta": 0.1, **changes.get("algorithm", {})}
    return Recipe.model_validate(plain | {"kind": "rl", "algorithm": algorithm})


def trainer_of(run: RunDir, recipe: Recipe, attempt: int = 1) -> Fsdp2Trainer:
    trainer = Fsdp2Trainer(make_context(run, recipe, attempt=attempt))
    trainer.load()
    return trainer


def begin(folder: Path, path: Path, **changes: Any) -> Fsdp2Trainer:
    folder.mkdir(exist_ok=True)
    recipe = recipe_of(folder, path, **changes)
    return trainer_of(make_run(folder, recipe, make_plan(recipe)), recipe)


def samples() -> list[TrainSample]:
    """Two good answers and two bad ones, as the sampler of nobody in particular would record them."""
    return [
        TrainSample(
            ordinal=number // 2,
            sample=number % 2,
            token_ids=[5, 6, 7, 30 + number, 31, 32 + number],
            loss_mask=[0, 0, 0, 1, 1, 1],
            log_probs=[0.0, 0.0, 0.0, -4.5, -4.5, -4.5],
            advantages=[0.0, 0.0, 0.0] + [1.0 if number % 2 else -1.0] * 3,
        )
        for number in range(4)
    ]


def command(step: int) -> TrainStep:
    found = samples()
    return TrainStep(step, [MicroBatch(found[:3]), MicroBatch(found[3:])], 12.0)


def run_steps(trainer: Fsdp2Trainer, first: int, last: int) -> list[float]:
    return [trainer.train_step(command(step))["train/kl_reference"] for step in range(first, last + 1)]


def weights(trainer: Fsdp2Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.module.parameters()]


def closed(trainer: Fsdp2Trainer, steps: int) -> tuple[list[float], list[torch.Tensor]]:
    """`steps` steps, and then no more: the penalties, and the weights."""
    found = run_steps(trainer, 1, steps), weights(trainer)
    trainer.close()
    return found


def test_the_penalty_is_against_the_start_and_holds_the_policy_back(tiny_model: Path, tmp_path: Path) -> None:
    far, _ = closed(begin(tmp_path / "loose", tiny_model, algorithm={"kl_beta": 1e-6}), 6)
    held = begin(tmp_path / "held", tiny_model, algorithm={"kl_beta": 5.0})
    assert isinstance(held.reference, SecondModel)
    batch = pack_samples(samples(), 1.0, held.device)
    with torch.no_grad():
        start, _ = held.model.log_probs(batch.row)
    near = run_steps(held, 1, 6)
    assert torch.equal(held.reference.log_probs(batch), start), "six steps of the policy do not move it"
    held.close()
    assert far[0] == near[0] == 0.0, "the same weights give the same log-probs, bit for bit"
    assert far[-1] > 0.01
    assert near[-1] < far[-1] / 4


def test_without_a_penalty_there_is_no_second_model(tiny_model: Path, tmp_path: Path) -> None:
    trainer = begin(tmp_path, tiny_model, algorithm={"kl_beta": 0.0})
    assert trainer.reference is None
    assert "train/kl_reference" not in trainer.train_step(command(1))
    trainer.close()


def test_adapters_off_is_the_model_that_the_run_began_with(tiny_model: Path, tmp_path: Path) -> None:
    off = begin(tmp_path / "off", tiny_model, **LORA)
    assert isinstance(off.reference, AdaptersOff)
    one, trained = closed(off, 5)
    full = begin(tmp_path / "full", tiny_model, **LORA, reference={"mode": "full"})
    assert isinstance(full.reference, SecondModel)
    assert not any("lora" in name for name, _ in full.reference.model.module.named_parameters())
    other, expected = closed(full, 5)
    assert one[0] == 0.0
    assert one[-1] > 1e-4
    assert one == other
    assert all(torch.equal(a, b) for a, b in zip(trained, expected, strict=True))


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_it_becomes_the_policy_every_so_often_and_a_resume_is_bit_equal(
    changes: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    trainer = begin(tmp_path, tiny_model, **changes, reference={"reset_every": 2})
    recipe, run = trainer.recipe, trainer.context.run_dir
    first = run_steps(trainer, 1, 3)
    assert first[1] > 0.0
    assert first[2] == 0.0, "after step 2 it is the policy"
    trainer.stage_checkpoint(3, run.checkpoint(3) / "policy", sync=True)
    assert [saved.error for saved in trainer.poll()] == [""]
    write_complete(run.checkpoint(3))
    rest, expected = run_steps(trainer, 4, 6), weights(trainer)
    trainer.close()
    again = trainer_of(run, recipe, attempt=2)
    assert again.step == 3
    assert run_steps(again, 4, 6) == rest
    assert rest[0] > 0.0
    assert rest[1] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(weights(again), expected, strict=True))
    again.close()


def test_a_reference_of_other_words_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "qwen2", vocab_size=128)
    with pytest.raises(ModelError, match=r"policy\.reference\.path: .* has 128 words .* the policy 96"):
        begin(tmp_path / "run", tiny_model, reference={"path": str(other)})


def test_another_model_can_be_the_reference(tiny_model: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "llama")
    trainer = begin(tmp_path / "run", tiny_model, reference={"path": str(other)})
    assert run_steps(trainer, 1, 1)[0] > 0.0
    trainer.close()
