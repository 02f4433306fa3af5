"""Whether a run has a reference model (`policy.reference`), and of which kind. No torch."""

from __future__ import annotations

from typing import Literal

from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.schema import Model, Recipe

Mode = Literal["full", "lora_off"]


def reference_mode(recipe: Recipe) -> Mode | None:
    """None where the algorithm asks for no reference. Raises RecipeError, UnknownExtension."""
    algorithms, name = registry("algorithms"), recipe.algorithm.get("name")
    if name is None or not algorithms.config(str(name), recipe.algorithm).needs_reference:
        return None
    options = recipe.policy.reference
    if options.mode != "auto":
        return options.mode
    lora = recipe.model.lora
    same = lora is not None and lora.adapter is None and not lora.modules_to_save
    return "lora_off" if same and options.path is None and options.reset_every is None else "full"


def reference_model(recipe: Recipe) -> Model:
    """What a `full` reference is built of. Adapters are in it only where they make a difference: those that
    the run began with, and those that a reset copies."""
    model, options = recipe.model, recipe.policy.reference
    changes: dict[str, object] = {"train": [], "freeze": []}
    if options.path is not None:
        changes |= {"path": options.path, "revision": options.revision, "tokenizer": None, "lora": None}
    elif model.lora is not None and model.lora.adapter is None and options.reset_every is None:
        changes["lora"] = None
    return model.model_copy(update=changes)
