"""Checks of the `eval` section against the rest of the recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpc_rl.catalog.limits import MAX_TEMPERATURE
from hpc_rl.recipe.messages import nearest
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import KeyPath

_CHECKPOINT = re.compile(r"/checkpoints/step_[0-9]{8,}/?\Z")
_OF_LOSS = {
    "sft": ("eval/loss", "eval/perplexity"),
    "preference": ("eval/loss", "eval/accuracy", "eval/margin"),
}
_OF_ANSWERS = ("eval/accuracy", "eval/reward_mean", "eval/length_mean", "eval/truncated", "eval/failed")
_GENERATING = ("samples", "temperature", "top_p", "threshold", "max_tokens")


def metrics_of(recipe: Recipe) -> list[str]:
    """What an evaluation of this recipe measures, as far as a checkpoint can be chosen by it."""
    if recipe.kind != "rl":
        return list(_OF_LOSS[recipe.kind])
    rewards = [f"eval/{item.get('name')}" for item in recipe.reward]
    ks = [1 << power for power in range(recipe.eval.samples.bit_length())]
    return list(dict.fromkeys([*_OF_ANSWERS, *rewards, *(f"eval/pass@{k}" for k in ks)]))


def check_evaluation(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    options, written = recipe.eval, recipe.eval.model_fields_set
    if recipe.kind != "rl":
        for name in _GENERATING:
            if name in written and getattr(options, name) != type(options).model_fields[name].default:
                yield ("eval", name), f"belongs to kind rl; kind {recipe.kind} evaluates by a loss"
        if options.best is not None and recipe.data.eval is None and not recipe.data.holdout:
            yield (
                ("eval", "best"),
                f"is {options.best!r}; without data.eval or data.holdout nothing is measured",
            )
    elif recipe.data.eval is None and options.best is not None:
        yield ("eval", "best"), f"is {options.best!r}; without data.eval nothing is measured"
    if recipe.kind == "rl":
        yield from _sampling(recipe)
    yield from _alone(recipe)
    allowed = metrics_of(recipe)
    if options.best is not None and options.best not in allowed:
        guess = nearest(options.best, allowed)
        hint = f" Did you mean {guess!r}?" if guess else ""
        yield ("eval", "best"), f"is {options.best!r}; must be one of {', '.join(allowed)}.{hint}"
    if options.best_mode is not None and options.best is None:
        yield ("eval", "best_mode"), "belongs to eval.best: name the metric, or leave it out"


def _alone(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """`eval.only` and what it evaluates."""
    options = recipe.eval
    if not options.only:
        if options.checkpoint is not None:
            yield ("eval", "checkpoint"), "belongs to eval.only: a run that trains begins with model.path"
        return
    if options.checkpoint is not None and not _CHECKPOINT.search(options.checkpoint):
        text = "must be a folder such as <run>/checkpoints/step_00000100"
        yield ("eval", "checkpoint"), f"is {options.checkpoint!r}; {text}"
    if recipe.data.eval is None and not (recipe.supervised and recipe.data.holdout):
        yield ("eval", "only"), "needs rows to evaluate on: give data.eval"
    if recipe.model.lora is not None and (options.checkpoint is not None or not recipe.supervised):
        text = "an evaluation takes whole weights (those of eval.checkpoint are merged): set it to null"
        yield ("model", "lora"), text


def _sampling(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    options = recipe.eval
    if options.temperature == 0 and options.samples > 1:
        text = f"is {options.samples}; at temperature 0 all answers are alike: set eval.temperature"
        yield ("eval", "samples"), text
    if options.temperature == 0 and options.top_p < 1:
        yield (
            ("eval", "top_p"),
            f"is {options.top_p:g}; it does nothing at temperature 0: set eval.temperature",
        )
    engine = recipe.rollout.engine if recipe.rollout is not None else ""
    hottest = MAX_TEMPERATURE.get(engine)
    if hottest is not None and options.temperature > hottest:
        text = f"is {options.temperature:g}; rollout.engine {engine} takes at most {hottest:g}"
        yield ("eval", "temperature"), text
