"""The items of a launch script's dataset (`recipe/launch`) as rows of the recipe's format."""

from __future__ import annotations

import inspect
from typing import Any

from hpc_rl.data.errors import DataError
from hpc_rl.recipe.launch.parts import REFERENCE, config_of, overrides
from hpc_rl.recipe.launch.script import ScriptSource, bound_recipe
from hpc_rl.recipe.schema import DatasetSpec, Recipe


def load_tokenizer(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    model = recipe.model
    return AutoTokenizer.from_pretrained(
        model.tokenizer or model.path,
        revision=None if model.tokenizer else model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def set_up(part: Any, config: Any, recipe: Recipe) -> Any:
    """`part` itself, made (a class, or a function of the configuration) and set up."""
    if inspect.isclass(part):
        part = part()
    elif inspect.isfunction(part):
        part = part(config) if inspect.signature(part).parameters else part()
    setup = getattr(type(part), "setup", None)
    if setup is None:
        return part
    wanted = inspect.signature(setup).parameters
    given: dict[str, Any] = {"config": config} if "config" in wanted else {}
    if "tokenizer" in wanted:
        given["tokenizer"] = load_tokenizer(recipe)
    setup(part, **given)
    return part


class ScriptRows:
    """The items of a launch script's dataset as rows of the recipe's format."""

    def __init__(self, source: ScriptSource, spec: DatasetSpec) -> None:
        recipe = bound_recipe()
        config = config_of(recipe, spec)
        self._spec = spec
        self._dataset = set_up(source.what, config, recipe)
        packer = source.parts.data_packer
        self._packer = None
        if packer is not None and overrides(packer, "get_rollout_input") and recipe.kind == "rl":
            self._packer = set_up(packer, config, recipe)
        self._answers = getattr(type(self._dataset), "get_reference_answer", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError for an item that is no prompt, or not one of the recipe's format."""
        item = self._dataset[index]
        content = self._packer.get_rollout_input(item) if self._packer is not None else item
        row = self._row(content)
        reference = self._answers(self._dataset, index) if self._answers is not None else None
        if reference is None:
            reference = getattr(item, REFERENCE, None)
        if reference is not None:
            plain = isinstance(reference, str | int | float)
            row[self._spec.answer] = reference if plain else str(reference)
            if not plain:
                row[REFERENCE] = reference
        return row

    def _row(self, content: Any) -> dict[str, Any]:
        spec = self._spec
        content = getattr(content, "conversation", None) or getattr(content, "prompt", content)
        if isinstance(content, dict):
            return dict(content)  # columns already
        if isinstance(content, str):
            if spec.format != "prompt_answer" or spec.chat is not False:
                text = "whole texts, which no chat template may wrap: set format=prompt_answer and chat=false"
                raise DataError(f"the script's prompts are {text} in the recipe's data section")
            return {spec.prompt: content}
        if isinstance(content, list) and content and all(_is_message(part) for part in content):
            if spec.format != "chat":
                text = "conversations: set format=chat in the recipe's data section"
                raise DataError(f"the script's prompts are {text} (it is {spec.format})")
            return {spec.messages: [_message(part) for part in content]}
        raise DataError(
            f"an item of the script's dataset becomes {type(content).__name__}; it must become text, a list "
            "of messages with role and content, or a mapping of columns (by the packer's get_rollout_input)"
        )


def _is_message(part: Any) -> bool:
    return (isinstance(part, dict) and {"role", "content"} <= part.keys()) or (
        isinstance(getattr(part, "role", None), str) and getattr(part, "content", None) is not None
    )


def _message(part: Any) -> dict[str, Any]:
    return dict(part) if isinstance(part, dict) else {"role": part.role, "content": part.content}
