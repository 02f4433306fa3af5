"""What `hpc-rl eval` evaluates, and the recipe overrides that make an evaluation of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.cli.errors import UserError
from hpc_rl.plan.make import read_plan
from hpc_rl.recipe.dump import dump_yaml, read_resolved
from hpc_rl.recipe.reference_model import reference_mode
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.best import read_best
from hpc_rl.run.evaluations import evaluations
from hpc_rl.run.index import find_run
from hpc_rl.run.paths import RunDir

TIME = "01:00:00"
_STEP = re.compile(r"step_(\d{8})\Z")
_NAME = 64  # characters that a recipe's name may have


@dataclass(frozen=True)
class Target:
    """`run` is None for a model folder of nobody's; `checkpoint` or `model` is where the weights are (both
    null: the model that the recipe names)."""

    run: RunDir | None
    label: str
    checkpoint: Path | None = None
    model: Path | None = None


def find_target(text: str, step: str | None) -> Target:
    """A run (by folder, name or job id), a folder of its checkpoints or exports, or any model folder.

    Raises UserError or RunError that lists what there is.
    """
    path = Path(text).expanduser().absolute()
    if not path.is_dir() or (path / "resolved.yaml").is_file():
        return _of_run(find_run(text), step)
    if step is not None:
        raise UserError(f"--step belongs to a run; {path} is one checkpoint or model already")
    run = RunDir(path.parent.parent)
    inside = path.parent.name if run.resolved.is_file() else ""
    if inside == "checkpoints" and _STEP.match(path.name):
        return _of_run(run, str(int(path.name[5:])), exports=False)
    if inside == "safetensors":
        return _of_run(run, "final" if path.name == "final" else str(int(path.name[5:])))
    if (path / "config.json").is_file():
        return Target(None, path.name, model=path)
    return _of_run(find_run(text), step)  # says why it is none


def _of_run(run: RunDir, step: str | None, *, exports: bool = True) -> Target:
    """The export of the step, else its complete checkpoint."""
    complete = run.complete_steps()
    exported = {int(m[1]) for path in run.safetensors.glob("step_*") if (m := _STEP.match(path.name))}
    final = run.safetensors / "final"
    there = [f"step {number}" for number in sorted({*complete, *exported})]
    there += ["final"] if final.is_dir() else []
    known = f"there is: {', '.join(there)}" if there else "it has no complete checkpoint and no export"
    if step == "final" or (step is None and final.is_dir()):
        if not final.is_dir():
            raise UserError(f"{run.root} has no final export; {known}")
        if _whole(final):
            return Target(run, "final", model=final)
        step = str(complete[-1]) if complete else None  # an adapter alone: its checkpoint is merged
    if step == "best":
        best = read_best(run)
        if best is None:
            raise UserError(f"{run.root} has no best checkpoint (nothing was evaluated, or kept); {known}")
        step = str(best.step)
    if step is None and complete:
        step = str(complete[-1])
    if step is None:
        raise UserError(f"{run.root} has nothing to evaluate: {known}")
    if not step.isdigit():
        raise UserError(f"--step is {step!r}; must be a number, best or final; {known}")
    number = int(step)
    folder = run.safetensors / run.checkpoint(number).name
    if exports and number in exported and _whole(folder):
        return Target(run, folder.name, model=folder)
    if number not in complete:
        raise UserError(f"{run.root} has no complete checkpoint and no export of step {number}; {known}")
    return Target(run, folder.name, checkpoint=run.checkpoint(number))


def _whole(folder: Path) -> bool:
    """Whether an export is a model, not an adapter alone."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def evaluation_overrides(target: Target, recipe: Recipe, overrides: Sequence[str]) -> list[str]:
    """What makes the resolved `recipe` an evaluation of `target`; the user's own words come last."""
    owner = recipe.name if target.run is None else target.run.recorded_name()
    name = f"{owner[: _NAME - len(target.label) - 1]}-{target.label}"[:_NAME]
    made = {
        "name": name,
        "eval.only": True,
        "eval.best": None,
        "eval.best_mode": None,
        "logging.wandb.mode": "off",
        "cluster.time": TIME,
        "cluster.signal_seconds": 60,
        "policy.profile": None,
        **_model(target, recipe),
    }
    if target.run is not None:
        made["output_root"] = str(evaluations(target.run))
    if recipe.supervised and any(re.match(r"reward\b", text) for text in overrides):
        made |= _scored(target)
    elif not recipe.supervised:
        made |= {"rollout.replicas": 1, "cluster.rollout.nodes": 1}
        if recipe.rollout is not None and recipe.rollout.weights.transport in ("nccl", "gloo"):
            made["rollout.weights.transport"] = "auto"
    elif recipe.kind == "preference" and reference_mode(recipe) is not None:
        made |= {"policy.reference.mode": "full"}
        if recipe.policy.reference.path is None:
            made |= {"policy.reference.path": recipe.model.path}
            made |= {"policy.reference.revision": recipe.model.revision}
    words = [f"{key}={dump_yaml(value).rstrip()}" for key, value in made.items()]
    return [*words, *overrides]


def _model(target: Target, recipe: Recipe) -> dict[str, object]:
    if target.checkpoint is not None:
        made: dict[str, object] = {"eval.checkpoint": str(target.checkpoint)}
    else:
        made = {"model.path": str(target.model), "model.revision": None, "model.tokenizer": None}
    made |= {"model.lora": None, "model.stage": None}
    if recipe.rollout is not None:
        made["rollout.weights.lora"] = "auto"
    return made


def _scored(target: Target) -> dict[str, object]:
    """A run without rollouts whose answers are to be scored all the same."""
    gpus = target.run is not None and read_plan(target.run.plan).groups[0].gpus_per_task > 0
    return {
        "kind": "rl",
        "algorithm": {"name": "grpo", "group_size": 1},
        "rollout": {"engine": "vllm" if gpus or target.run is None else "hf", "replicas": 1},
        "data.train.format": "prompt_answer",
        "data.holdout": 0,
        "policy.guard.spike": None,
        "policy.batch_tokens": None,
    }


def resolved(run: RunDir) -> Recipe:
    """The recipe of a run. Raises RunError or RecipeError."""
    return read_resolved(run.resolved)
