"""Small runs for the tests of the policy: a run directory, a recipe, a plan, a trainer in this process."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hpc_rl.plan.schema import Group, Mesh, Plan
from hpc_rl.policy.trainer import TrainerContext
from hpc_rl.recipe.dump import dump_resolved
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir

TEXTS = ["2+3=5", "10+1=11", "7+7=14", "4+9=13", "1+1=2", "0+8=8", "30+5=35", "6+2=8", "9+9=18", "12+3=15"]


def write_rows(path: Path) -> Path:
    rows = [dict(zip(("prompt", "completion"), t.split("=", 1), strict=True)) for t in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_recipe(folder: Path, model: Path, **policy: Any) -> Recipe:
    """SFT on ten additions: batches of 4, packed into forwards of 32 tokens."""
    options = {"batch_size": 4, "micro_batch_tokens": 32, "steps": 8, **policy}
    options.setdefault("optimizer", {"lr": 3e-3, "schedule": "linear", "warmup_steps": 2})
    return Recipe.model_validate(
        {
            "name": "tiny",
            "kind": "sft",
            "seed": 3,
            "model": {"path": str(model), "dtype": "float32"},
            "data": {
                "train": {"path": str(write_rows(folder / "rows.jsonl")), "format": "prompt_completion"}
            },
            "policy": options,
        }
    )


def make_plan(recipe: Recipe, world_size: int = 1) -> Plan:
    group = Group(
        role="policy", component=None, job_name="tiny:policy", nodes=1, tasks=world_size,
        tasks_per_node=world_size, cpus_per_task=1, gpus_per_task=0, gpus_per_node=0,
    )  # fmt: skip
    return Plan(
        name=recipe.name, kind=recipe.kind, placement="local", site="local", time_minutes=5,
        groups=[group], mesh=Mesh(dp_shard=world_size),
    )  # fmt: skip


def make_run(folder: Path, recipe: Recipe, plan: Plan) -> RunDir:
    run = RunDir.create(folder, recipe.name, run_id="run")
    run.resolved.write_text(dump_resolved(recipe))
    run.plan.write_text(plan.model_dump_json())
    return run


def make_context(
    run: RunDir,
    recipe: Recipe,
    *,
    rank: int = 0,
    world_size: int = 1,
    bus_file: Path | None = None,
    attempt: int = 1,
) -> TrainerContext:
    return TrainerContext(
        recipe=recipe,
        plan=make_plan(recipe, world_size),
        run_dir=run,
        rank=rank,
        world_size=world_size,
        attempt=attempt,
        incarnation=1,
        bus_file=bus_file,
        log=logging.getLogger("test"),
    )
