"""GRPO and its kin in one process: they learn a target that can be checked, and bad numbers are named."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hpc_rl.algorithms.advantages import step_advantages
from hpc_rl.bus.messages import MicroBatch, TrainStep
from hpc_rl.controller.batch import loss_denominator
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.policy.trainer import NonFiniteError
from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.schema import Recipe
from hpc_rl.types import TrainSample
from tests.training import make_context, make_plan, make_recipe, make_run

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
TARGET, PROMPT, ANSWER, GROUP = 40, [5, 6, 7], 4, 32
WORDS = r"step 1: the loss is not finite; samples 0\.2, 0\.3; there is no checkpoint$"


def make_trainer(folder: Path, model: Path, **algorithm: object) -> Fsdp2Trainer:
    recipe = make_recipe(folder, model, steps=100, optimizer={"lr": 2e-3, "weight_decay": 0.0})
    changes = {"kind": "rl", "algorithm": {"name": "grpo", **algorithm}}
    recipe = Recipe.model_validate(recipe.model_dump() | changes)
    trainer = Fsdp2Trainer(make_context(make_run(folder, recipe, make_plan(recipe)), recipe))
    assert trainer.load() == 0
    return trainer


@torch.no_grad()
def sample(trainer: Fsdp2Trainer, temperature: float) -> list[tuple[list[int], list[float]]]:
    """Answers with the sampler's log-probs, by transformers' own generation."""
    module = trainer.model.module.eval()
    out = module.generate(
        torch.tensor([PROMPT] * GROUP), max_new_tokens=ANSWER, min_new_tokens=ANSWER, do_sample=True,
        temperature=temperature, top_k=0, pad_token_id=0, eos_token_id=None,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    module.train()
    answers = out.sequences[:, len(PROMPT) :]
    scores = torch.stack(out.scores, dim=1).float().log_softmax(-1)  # already over the temperature
    log_probs = scores.gather(2, answers[:, :, None]).squeeze(2)
    return list(zip(answers.tolist(), log_probs.tolist(), strict=True))


def make_samples(
    answers: list[tuple[list[int], list[float]]], advantage: str = "group_std"
) -> tuple[list[TrainSample], float]:
    rewards = [answer.count(TARGET) / ANSWER for answer, _ in answers]
    (advantages,) = step_advantages(advantage, [rewards])
    before = len(PROMPT)
    samples = [
        TrainSample(
            ordinal=0,
            sample=number,
            token_ids=PROMPT + answer,
            loss_mask=[0] * before + [1] * ANSWER,
            log_probs=[0.0] * before + log_probs,
            advantages=[0.0] * before + [float(value)] * ANSWER,
        )
        for number, ((answer, log_probs), value) in enumerate(zip(answers, advantages, strict=True))
    ]
    return samples, sum(rewards) / len(rewards)


def step_of(step: int, samples: list[TrainSample], aggregation: str = "token_mean") -> TrainStep:
    half = len(samples) // 2
    denominator = loss_denominator(samples, aggregation, ANSWER)
    return TrainStep(step, [MicroBatch(samples[:half]), MicroBatch(samples[half:])], denominator)


@pytest.mark.parametrize("proximal", ["sampler", "recompute"])
def test_it_learns_a_verifiable_target(proximal: str, tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model, temperature=1.2, proximal=proximal)
    rewards = []
    for step in range(1, 41):
        samples, reward = make_samples(sample(trainer, 1.2))
        rewards.append(reward)
        metrics = trainer.train_step(step_of(step, samples))
        # The trainer's log-probs at the temperature are the sampler's: same weights, fp32.
        assert metrics["train/mismatch_mean"] < 1e-6
        assert metrics["train/mismatch_max"] < 1e-5
        assert abs(metrics["train/ratio_mean"] - 1) < 1e-5
        if rewards[-1] > 0.9:
            break
    trainer.close()
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.9, rewards


@pytest.mark.parametrize(
    "name", sorted(set(registry("algorithms").names()) - {"grpo", "sft", "dpo", "distill"})
)
def test_every_algorithm_learns_it(name: str, tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model, name=name)
    config = registry("algorithms").config(name, {})
    rewards = []
    for step in range(1, 41):
        samples, reward = make_samples(sample(trainer, 1.0), config.advantage)
        rewards.append(reward)
        metrics = trainer.train_step(step_of(step, samples, config.loss_aggregation))
        assert metrics["train/ess"] > 0.999, "on-policy, every token counts"
        assert metrics["train/clip_fraction"] == metrics["train/dropped_fraction"] == 0.0
        if rewards[-1] > 0.5:
            break
    trainer.close()
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.5, rewards


def test_stale_samples_are_clipped_and_measured(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model)
    samples, _ = make_samples(sample(trainer, 1.0))
    seen = [trainer.train_step(step_of(step, samples)) for step in range(1, 5)]
    trainer.close()
    mismatch = [metrics["train/mismatch_mean"] for metrics in seen]
    assert mismatch[0] < 1e-6 < 0.01 < mismatch[-1]
    assert seen[0]["train/clip_fraction"] == 0.0
    assert seen[-1]["train/clip_fraction"] > 0.05
    assert 0 < seen[0]["train/entropy"] < math.log(96) + 1e-4


def test_an_entropy_bonus_makes_the_policy_broader(tiny_model: Path, tmp_path: Path) -> None:
    """Where nothing else teaches."""
    trainer = make_trainer(tmp_path, tiny_model, entropy_beta=1.0)
    with torch.no_grad():  # of a random model the entropy is as large as it can be
        trainer.model.module.get_input_embeddings().weight.mul_(20.0)
    samples, _ = make_samples([([8, 9, 10, 11], [-4.0] * ANSWER)] * 4)
    entropy = [trainer.train_step(step_of(step, samples))["train/entropy"] for step in range(1, 6)]
    trainer.close()
    assert all(later > before for before, later in pairwise(entropy)), entropy


def test_a_nan_names_its_samples(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model)
    samples, _ = make_samples(sample(trainer, 1.0))
    samples[3].advantages[-1] = float("nan")
    command = TrainStep(1, [MicroBatch(samples[:2]), MicroBatch(samples[2:4])], 16.0)
    with pytest.raises(NonFiniteError, match=WORDS):
        trainer.train_step(command)
    trainer.close()


def test_commands_out_of_order_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model)
    with pytest.raises(ValueError, match="step 2 was commanded after step 0"):
        trainer.train_step(TrainStep(2))
    with pytest.raises(ValueError, match="checkpoint of step 4"):
        trainer.stage_checkpoint(4, tmp_path, sync=True)
    trainer.close()


def test_a_step_without_tokens_counts_and_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Not even by momentum or weight decay."""
    trainer = make_trainer(tmp_path, tiny_model)
    trainer.train_step(step_of(1, make_samples(sample(trainer, 1.0))[0]))
    before = [parameter.detach().clone() for parameter in trainer.model.module.parameters()]
    assert trainer.train_step(TrainStep(2)) == {"train/skipped": 1.0}
    assert trainer.step == 2
    after = trainer.model.module.parameters()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    trainer.close()
