"""Checks of how the policy learns: the reference model, several updates per step."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_rl.recipe.extensions import UnknownExtension
from hpc_rl.recipe.reference_model import reference_mode
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.schema import Reference as ReferenceOptions
from hpc_rl.recipe.schema import Updates as UpdatesOptions
from hpc_rl.recipe.yaml_source import KeyPath, RecipeError

Found = Iterator[tuple[KeyPath, str]]


def check_learner(recipe: Recipe) -> Found:
    """`policy.reference` and `policy.updates` against the algorithm, the model and themselves."""
    yield from _updates(recipe)
    try:
        mode = reference_mode(recipe)
    except (RecipeError, UnknownExtension, ImportError, TypeError):  # said where the algorithm is
        return
    options, path = recipe.policy.reference, ("policy", "reference")
    if mode is None:
        if options != ReferenceOptions():
            text = "nothing in this recipe is held to a reference: leave it out, or set algorithm.kl_beta"
            yield path, text
        return
    if options.revision is not None and options.path is None:
        yield (*path, "revision"), "belongs to policy.reference.path, which is not set"
    if options.reset_every is not None and options.path is not None:
        text = "copies the policy into the reference, which must begin as the same model: leave out path"
        yield (*path, "reset_every"), text
    if mode == "lora_off":
        yield from _without_adapters(recipe)


def _updates(recipe: Recipe) -> Found:
    options, path = recipe.policy.updates, ("policy", "updates")
    if recipe.kind != "rl" and options != UpdatesOptions():
        yield path, f"belongs to kind rl; in kind {recipe.kind} a step is one update: set policy.batch_size"
    elif options.mini_batches > recipe.policy.batch_size:
        text = f"is {options.mini_batches}; must be at most policy.batch_size {recipe.policy.batch_size}"
        yield (*path, "mini_batches"), text


def _without_adapters(recipe: Recipe) -> Found:
    options, lora, key = recipe.policy.reference, recipe.model.lora, ("policy", "reference", "mode")
    if lora is None:
        yield key, "is 'lora_off'; there are no adapters without model.lora: use full"
    elif lora.modules_to_save:
        text = (
            "is 'lora_off'; modules of model.lora.modules_to_save stay trained without the adapters: use full"
        )
        yield key, text
    if options.path is not None or options.reset_every is not None or options.cpu_offload:
        yield (
            key,
            "is 'lora_off', which is the policy's own model: path, reset_every and cpu_offload need full",
        )
