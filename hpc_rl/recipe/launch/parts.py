"""What a launch script is given as its configuration, its rewards as one, and what of it is not used."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from hpc_rl.recipe.launch.script import bound_recipe
from hpc_rl.recipe.plugins import plugin_source
from hpc_rl.recipe.schema import DatasetSpec, Recipe

REFERENCE = "reference_answer"  # the row's own, where it is no text


def config_of(recipe: Recipe, spec: DatasetSpec | None = None) -> SimpleNamespace:
    """What a script reads of cosmos-rl's configuration, by its names. Another name is an AttributeError."""
    train = recipe.data.train if spec is None else spec
    source = plugin_source(train.path)
    name = source[1] if source is not None else train.path
    dataset = SimpleNamespace(
        name=name, subset=train.subset or "", split=train.split, revision=train.revision or ""
    )
    rollout = recipe.rollout
    return SimpleNamespace(
        custom={},
        policy=SimpleNamespace(
            model_name_or_path=recipe.model.path,
            model_revision=recipe.model.revision,
            model_max_length=(rollout.max_model_len if rollout is not None else recipe.policy.max_length)
            or 4096,
        ),
        rollout=SimpleNamespace(
            n_generation=recipe.algorithm.get("group_size", 1),
            max_response_length=rollout.max_tokens if rollout is not None else 0,
        ),
        train=SimpleNamespace(
            seed=recipe.seed,
            output_dir=recipe.output_root,
            train_policy=SimpleNamespace(
                type="grpo" if recipe.kind == "rl" else recipe.kind,
                dataset=dataset,
                prompt_column_name=train.prompt,
                response_column_name=train.answer,
                conversation_column_name=train.messages,
            ),
        ),
        validation=SimpleNamespace(enable=recipe.data.eval is not None, dataset=dataset),
    )


def reward_of(functions: list[Callable[..., Any]]) -> Callable[..., Any]:
    """The sum of reward functions `(to_be_evaluated, reference, **kw)`; of the further arguments that
    cosmos-rl passes they may ask for `prompt` and `config`."""

    async def score(prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> float:
        reference = fields.get(REFERENCE, answer)
        total = 0.0
        for function in functions:
            value = function(response, reference, **_asked(function, prompt))
            total += float(await value if inspect.isawaitable(value) else value)
        return total

    return score


def _asked(function: Callable[..., Any], prompt: str) -> dict[str, Any]:
    """The keyword arguments that `function` names."""
    wanted = inspect.signature(function).parameters
    given: dict[str, Any] = {}
    if "prompt" in wanted:
        given["prompt"] = prompt
    if "config" in wanted:
        given["config"] = config_of(bound_recipe())
    return given


_UNUSED = (
    *("get_policy_input", "policy_collate_fn", "policy_compute_max_len", "rollout_collate_fn"),
    *("sft_process_sample", "sft_collate_fn", "sft_compute_max_len"),
)


def overrides(packer: Any, name: str) -> bool:
    from hpc_rl.recipe.launch.stand_ins import DataPacker

    cls = packer if inspect.isclass(packer) else type(packer)
    return getattr(cls, name, None) is not getattr(DataPacker, name, None)


def packer_warning(packer: Any) -> str:
    """What of a data packer is not used, in words; empty if nothing."""
    if packer is None:
        return ""
    unused = [name for name in _UNUSED if overrides(packer, name)]
    if not unused:
        return ""
    return (
        f"{', '.join(unused)} of the data packer are not used: the policy trains on just the tokens that "
        "were sampled, and rows are packed by tokens"
    )
