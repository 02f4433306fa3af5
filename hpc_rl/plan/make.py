"""Recipe + site -> plan. Everything that does not fit is one RecipeError with file, line and key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from hpc_rl.catalog.facts import ModelFacts, ModelFilesError, read_facts
from hpc_rl.catalog.families import policy_tp_error, rollout_tp_error
from hpc_rl.catalog.local_models import find_model
from hpc_rl.catalog.trainers import MESH_DIMENSIONS, unsupported_dimensions
from hpc_rl.plan.adapters import lora_sync, obstacle
from hpc_rl.plan.advice import advice
from hpc_rl.plan.groups import Placement, Sizer
from hpc_rl.plan.memory import auto_transport, copies_note, estimate, memory_warnings
from hpc_rl.plan.schema import Mesh, Plan
from hpc_rl.plan.served import served_warnings
from hpc_rl.plan.site import Site
from hpc_rl.recipe.checks import parse_time
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import Problem, RecipeError


def make_plan(loaded: LoadedRecipe, site: Site, *, here: bool = False) -> Plan:
    """Work out groups, mesh and memory. Raises RecipeError; what only looks odd is in `plan.warnings`.

    `here`: the run starts inside an allocation, so partitions and sizes of memory mean nothing.
    """
    recipe = loaded.recipe
    placement: Placement = recipe.cluster.placement or site.placement
    if placement == "split":
        text = "is 'split', which is not available; use het, shared or local"
        raise RecipeError([loaded.problem(text, "cluster", "placement")])
    sizer = Sizer(loaded, site, placement, here)
    problems = sizer.problems
    groups = sizer.groups()
    minutes = parse_time(recipe.cluster.time)
    if site.time_max is not None and placement != "local" and minutes > parse_time(site.time_max):
        text = f"is {recipe.cluster.time!r}; site {site.name} allows {site.time_max}"
        problems.append(loaded.problem(text, "cluster", "time"))
    mesh = Mesh(**recipe.policy.parallel.model_dump()) if recipe.has_policy else Mesh()
    for name in unsupported_dimensions(recipe.policy.trainer, mesh.model_dump()):
        able = f"trainer {recipe.policy.trainer} shards by dp_replicate, dp_shard and tp, keep 1"
        problems.append(loaded.problem(f"is {getattr(mesh, name)}; {able}", "policy", "parallel", name))
    facts = _facts(loaded, site, problems)
    warnings = [*sizer.warnings, *advice(loaded, placement, here=here)]
    memory = None
    if facts is not None:
        problems += _head_problems(loaded, facts) + _length_problems(loaded, facts)
        problems += _family_problems(loaded, facts)
        warnings += _family_warnings(facts)
        if facts.parameters is not None and not recipe.eval.only:
            gpu_gb = site.gpus.memory_gb if any(group.gpus_per_task for group in groups) else None
            memory = estimate(recipe, facts.parameters, mesh, gpu_gb, facts.shapes)
            warnings += memory_warnings(recipe, memory)
    warnings += served_warnings(recipe, site, groups)
    lora, note = _lora_sync(loaded, facts, problems)
    if problems:
        raise RecipeError(problems)
    group_size = recipe.algorithm.get("group_size", 1)
    copies = copies_note(recipe, facts.parameters if facts else None, groups, adapter=lora == "adapter")
    return Plan(
        name=recipe.name,
        kind=recipe.kind,
        placement=placement,
        site=site.name,
        time_minutes=minutes,
        groups=groups,
        mesh=mesh,
        prompts_per_step=recipe.policy.batch_size // group_size if recipe.kind == "rl" else 0,
        total_steps=None if recipe.eval.only else recipe.policy.steps,
        memory=memory,
        pair_cost=facts.flops.pair_cost if facts is not None and facts.flops is not None else 0.0,
        lora_sync=lora,
        notes=[text for text in (note, copies) if text],
        warnings=warnings,
        site_profile=site.model_dump(mode="json"),
    )


def _lora_sync(
    loaded: LoadedRecipe, facts: ModelFacts | None, problems: list[Problem]
) -> tuple[Literal["merged", "adapter"] | None, str]:
    """`(what a run with adapters sends, that in words)`; None for a run without adapters or rollouts."""
    rollout = loaded.recipe.rollout
    if rollout is None or loaded.recipe.model.lora is None:
        return None, ""
    wanted = rollout.weights.lora
    if wanted == "adapter" and (reason := obstacle(loaded.recipe, facts)):
        text = f"is 'adapter', but {reason}; use merged"
        problems.append(loaded.problem(text, "rollout", "weights", "lora"))
    mode, reason = lora_sync(loaded.recipe, facts) if wanted == "auto" else (wanted, "")
    what = "the adapter alone" if mode == "adapter" else "whole merged weights"
    return mode, f"pushes to the rollouts hold {what}" + (f": {reason}" if reason else "")


def resolve_recipe(loaded: LoadedRecipe, site: Site, plan: Plan) -> Recipe:
    """The recipe as the run keeps it: every `auto` and every path settled by site and plan."""
    recipe = loaded.recipe.model_copy(deep=True)
    recipe.extends = None
    recipe.cluster.site = site.name
    recipe.cluster.placement = plan.placement
    root = recipe.output_root
    if not loaded.written("output_root") and site.paths.output_root is not None:
        root = site.paths.output_root
    recipe.output_root = os.path.abspath(Path(os.path.expandvars(root)).expanduser())
    recipe.cluster.template = recipe.cluster.template or site.template
    if recipe.eval.only:  # there is nothing to save
        recipe.checkpoint.enabled, recipe.checkpoint.export = False, "off"
        recipe.checkpoint.upload_hub = recipe.checkpoint.upload_s3 = None
    if recipe.rollout is not None and recipe.rollout.weights.transport == "auto":
        on_gpu = all(group.gpus_per_task > 0 for group in plan.groups if group.role in ("policy", "rollout"))
        recipe.rollout.weights.transport = auto_transport(recipe.rollout.weights, on_gpu)
    if recipe.rollout is not None and plan.lora_sync is not None:
        recipe.rollout.weights.lora = plan.lora_sync
    return recipe


def write_plan(plan: Plan, path: Path) -> None:
    """Write `plan.json` (atomically: a reader sees the old plan or the new one)."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_plan(path: Path) -> Plan:
    """Read `plan.json`. Raises FileNotFoundError or ValueError naming the file."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        return Plan.model_validate_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a plan of this version of hpc-rl: {error}") from error


def _facts(loaded: LoadedRecipe, site: Site, problems: list[Problem]) -> ModelFacts | None:
    """Facts of the model when its files are here; preflight complains when they are not."""
    model = loaded.recipe.model
    folder = find_model(model.path, model.revision, site.paths.hf_home)
    if folder is None:
        return None
    try:
        return read_facts(folder)
    except ModelFilesError as error:
        problems.append(loaded.problem(str(error), "model", "path"))
        return None


def _head_problems(loaded: LoadedRecipe, facts: ModelFacts) -> list[Problem]:
    if facts.heads is None or facts.kv_heads is None:
        return []
    problems = []
    recipe = loaded.recipe
    message = policy_tp_error(facts.heads, facts.kv_heads, recipe.policy.parallel.tp)
    if message is not None:
        problems.append(loaded.problem(message, "policy", "parallel", "tp"))
    if recipe.rollout is not None:
        message = rollout_tp_error(facts.heads, facts.kv_heads, recipe.rollout.parallel.tp)
        if message is not None:
            problems.append(loaded.problem(message, "rollout", "parallel", "tp"))
    if facts.layers is not None and recipe.policy.parallel.pp > facts.layers:
        text = f"exceeds the model's {facts.layers} layers"
        problems.append(loaded.problem(text, "policy", "parallel", "pp"))
    return problems


def _length_problems(loaded: LoadedRecipe, facts: ModelFacts) -> list[Problem]:
    """Lengths that the model has no positions for. A completion needs one position more, for its prompt."""
    recipe, end = loaded.recipe, facts.max_position
    if end is None:
        return []
    lengths: list[tuple[tuple[str, ...], int | None, int]] = [
        (("policy", "max_length"), recipe.policy.max_length, end)
    ]
    if recipe.rollout is not None:
        lengths += [
            (("rollout", "max_model_len"), recipe.rollout.max_model_len, end),
            (("rollout", "max_tokens"), recipe.rollout.max_tokens, end - 1),
            (("eval", "max_tokens"), recipe.eval.max_tokens, end - 1),
        ]
    return [
        loaded.problem(
            f"is {length}; the model's positions end at {end}" + (", prompt included" if most < end else ""),
            *path,
        )
        for path, length, most in lengths
        if length is not None and length > most
    ]


def _family_problems(loaded: LoadedRecipe, facts: ModelFacts) -> list[Problem]:
    """What Transformers or vLLM is known not to do for this family."""
    recipe, family = loaded.recipe, facts.family
    if family is None:
        return []
    problems = []
    tp = recipe.policy.parallel.tp
    if tp > 1 and recipe.policy.trainer in MESH_DIMENSIONS and not family.tp:
        text = f"is {tp}; Transformers has no plan to split {family.name} models, keep 1 and use dp_shard"
        problems.append(loaded.problem(text, "policy", "parallel", "tp"))
    if recipe.rollout is not None and recipe.rollout.engine == "vllm" and not family.vllm:
        text = f"is 'vllm', which does not serve {family.name} models; use hf"
        problems.append(loaded.problem(text, "rollout", "engine"))
    return problems


def _family_warnings(facts: ModelFacts) -> list[str]:
    if facts.family is not None:
        return []
    return [f"model type {facts.model_type!r} is not in the catalog; only its heads are checked against tp"]
