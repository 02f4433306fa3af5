"""SFT runs of the real trainer in this process, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hpc_rl.bus.messages import TrainStep
from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from tests.training import make_context, make_plan, make_recipe, make_run

# Where numerics are compared: Adam's first steps divide rounding noise by itself.
SGD = {"name": "sgd", "lr": 0.3, "clip_norm": 1.0, "weight_decay": 0.0}


def train(trainer: Fsdp2Trainer, first: int, last: int) -> list[float]:
    return [trainer.train_step(TrainStep(step))["train/loss"] for step in range(first, last + 1)]


def save(trainer: Fsdp2Trainer, run: RunDir, step: int) -> None:
    trainer.stage_checkpoint(step, run.checkpoint(step) / "policy", sync=True)
    results = list(trainer.poll())
    if trainer.rank == 0:
        assert [(r.step, r.error) for r in results] == [(step, "")]
        write_complete(run.checkpoint(step))


def full(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    whole = {n: t.detach() for n, t in tensors.items()}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in whole.items()}


def parameters(trainer: Fsdp2Trainer) -> dict[str, torch.Tensor]:
    return full(dict(trainer.model.module.named_parameters()))


def averages(trainer: Fsdp2Trainer) -> dict[str, torch.Tensor]:
    assert trainer.ema is not None
    return full(trainer.ema.shadow)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def with_eval(recipe: Recipe) -> Recipe:
    """The same, with its own training rows as validation data."""
    data = recipe.data.model_dump()
    return Recipe.model_validate(recipe.model_dump() | {"data": data | {"eval": data["train"]}})


def full_recipe(folder: Path, model: Path, **policy: Any) -> Recipe:
    """Everything at once that a checkpoint must bring back: averages, groups, a schedule, a spike guard."""
    optimizer = {
        "lr": 3e-3,
        "min_lr": 3e-4,
        "schedule": "cosine",
        "warmup_ratio": 0.25,
        "groups": [
            {"match": r"embed_tokens", "lr": 1e-3, "weight_decay": 0.0},
            {"match": "norm", "lr": 1e-4},
        ],
    }
    options = {"ema": {"decay": 0.8}, "guard": {"spike": 50.0, "window": 4}, "optimizer": optimizer}
    return with_eval(make_recipe(folder, model, **options, **policy))


def start(run: RunDir, recipe: Recipe, attempt: int = 1, step: int = 0) -> Fsdp2Trainer:
    trainer = Fsdp2Trainer(make_context(run, recipe, attempt=attempt))
    assert trainer.load() == step
    return trainer


def fresh(folder: Path, recipe: Recipe) -> tuple[RunDir, Fsdp2Trainer]:
    run = make_run(folder, recipe, make_plan(recipe))
    return run, start(run, recipe)
