"""SFT runs of the real trainer in this process, step by step."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc_rl.bus.messages import TrainStep
from hpc_rl.bus.server import RedisServer
from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.plan.schema import Mesh
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from tests.ranks import run_ranks
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


# --- whole runs, in one process and in ranks --------------------------------------------------------------
def record(trainer: Fsdp2Trainer, last: int, cut: int, run: RunDir | None = None) -> dict[str, Any]:
    """Steps 1 to `last`: losses, validation losses (before, at `cut`, after), last weights and averages.

    With `run`, the checkpoint of step `cut` is saved there.
    """
    assert trainer.sft is not None
    evals: list[float] = []

    def validate(step: int) -> None:
        if trainer.sft is not None and trainer.sft.eval_rows:
            evals.append(trainer.evaluate(step)["eval/loss"])

    validate(0)
    losses = train(trainer, 1, cut)
    validate(cut)
    if run is not None:
        save(trainer, run, cut)
    losses += train(trainer, cut + 1, last)
    validate(last)
    found = {"losses": losses, "evals": evals, "parameters": parameters(trainer)}
    return found | ({"averages": averages(trainer)} if trainer.ema is not None else {})


def one_process(folder: Path, recipe: Recipe, last: int | None = None, cut: int = 2) -> dict[str, Any]:
    """`record` of a run of its own (all its steps, or up to `last`)."""
    _, trainer = fresh(folder, recipe)
    found = record(trainer, last or trainer.total_steps, cut)
    trainer.close()
    return found


def sharded(
    folder: Path, recipe: Recipe, server: RedisServer, last: int, cut: int, mesh: Mesh | None = None
) -> tuple[RunDir, dict[str, Any]]:
    """`(the run, record)` of two ranks, whose checkpoint of step `cut` is in the run."""
    mesh = mesh or Mesh(dp_shard=2)
    run = make_run(folder / "run", recipe, make_plan(recipe, 2))
    server.write_bus_file(run.bus_file(1))
    out = folder / "ranks.pt"
    arguments = (str(run.root), recipe.model_dump_json(), str(out), mesh, last, cut)
    run_ranks(_rank, 2, folder, *arguments, group=False)
    found: dict[str, Any] = torch.load(out)
    return run, found


def _rank(
    rank: int, world_size: int, root: str, recipe_json: str, out: str, mesh: Mesh, last: int, cut: int
) -> None:
    recipe, run = Recipe.model_validate_json(recipe_json), RunDir(Path(root))
    context = make_context(run, recipe, rank=rank, world_size=world_size, bus_file=run.bus_file(1))
    plan = context.plan.model_copy(update={"mesh": mesh})
    trainer = Fsdp2Trainer(dataclasses.replace(context, plan=plan))
    assert trainer.load() == 0
    found = record(trainer, last, cut, run)
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    trainer.close()


def apart(left: Any, right: Any) -> float:
    """The largest difference between two lists of losses, or two sets of tensors."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        return max(float((left[name] - right[name]).abs().max()) for name in left)
    return max(abs(a - b) for a, b in zip(left, right, strict=True))
