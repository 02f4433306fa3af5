"""From recipe and plan to what the engine and the scorers are made from."""

from __future__ import annotations

from pathlib import Path

from hpc_rl.plan.adapters import adapter_settings
from hpc_rl.plan.schema import Plan
from hpc_rl.recipe.extensions import is_served, registry
from hpc_rl.recipe.schema import Recipe
from hpc_rl.rewards.base import reward_specs
from hpc_rl.rewards.pool import ScorerPool
from hpc_rl.rollout.engine import AdapterShape, EngineSettings, TransferSettings
from hpc_rl.simulators.base import SimulatorSettings, TextSimulator, make_simulator, simulator_config
from hpc_rl.weights.transports import keeps_copies, transport_name

MAX_SCORERS = 4
TEXT_SLOTS = 4096  # a conversation costs nothing while it waits for the engine


def engine_settings(
    recipe: Recipe, plan: Plan, *, bus_file: Path, attempt: int, replica: int, incarnation: int
) -> EngineSettings:
    """Raises RecipeError for bad engine options."""
    rollout = recipe.rollout
    assert rollout is not None, "the plan has a rollout group only if the recipe has a rollout section"
    return EngineSettings(
        model=recipe.model.path,
        options=registry("engines").config(rollout.engine, dict(rollout.engine_options)),
        revision=recipe.model.revision,
        tokenizer=recipe.model.tokenizer,
        dtype=recipe.model.dtype,
        trust_remote_code=recipe.model.trust_remote_code,
        attn_implementation=recipe.model.attn_implementation,
        tp=rollout.parallel.tp,
        pp=rollout.parallel.pp,
        max_model_len=rollout.max_model_len,
        stop=tuple(rollout.stop),
        seed=recipe.seed,
        transfer=TransferSettings(
            bus_file=bus_file,
            attempt=attempt,
            replica=replica,
            incarnation=incarnation,
            transport=transport_name(recipe, plan),
            keep=keeps_copies(recipe, plan),
        )
        if recipe.has_policy  # else nobody pushes
        else None,
        adapter=adapter_shape(recipe),
    )


def adapter_shape(recipe: Recipe) -> AdapterShape | None:
    """Of the adapter that pushes hold alone; None where they hold whole weights."""
    rollout, lora = recipe.rollout, recipe.model.lora
    if rollout is None or lora is None or rollout.weights.lora != "adapter":
        return None
    settings = adapter_settings(lora)
    targets = settings.get("target_modules")
    names = targets if isinstance(targets, list) else []  # "all-linear", or a pattern
    return AdapterShape(settings["rank"], tuple(sorted({name.rpartition(".")[2] for name in names})))


def text_simulator(recipe: Recipe, plan: Plan, code: Path) -> TextSimulator | None:
    """The environment of a recipe whose answers are episodes. Raises RecipeError for bad options."""
    if recipe.simulator is None:
        return None
    settings = SimulatorSettings(
        config=simulator_config(recipe),
        slots=TEXT_SLOTS,
        workers=helpers(plan),
        plugins=tuple(recipe.plugins),
        code=str(code),
    )
    simulator: TextSimulator = make_simulator(recipe.simulator["name"], settings)  # type: ignore[assignment]
    return simulator


def helpers(plan: Plan) -> int:
    """As many processes of a kind as the replica has cores to spare, at most MAX_SCORERS."""
    return max(1, min(MAX_SCORERS, plan.group("rollout").cpus_per_task - 1))


def scorer_pool(recipe: Recipe, plan: Plan, code: Path) -> ScorerPool:
    """As many scorers as the replica has cores to spare, at most MAX_SCORERS. Rewards that the reward group
    serves are not theirs."""
    rewards = zip(reward_specs(recipe.reward), recipe.reward, strict=True)
    return ScorerPool(
        [spec for spec, item in rewards if not is_served(item)],
        plugins=recipe.plugins,
        code=str(code),
        size=helpers(plan),
    )
