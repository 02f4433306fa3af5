"""TOML files from dotted keys, and the recipe that they become."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hpc_rl.recipe.cosmos import Conversion, convert_file

# The least that an SFT configuration says; four GPUs.
BASE: dict[str, Any] = {
    "train.train_policy.type": "sft",
    "train.train_policy.dataset.name": "org/rows",
    "policy.model_name_or_path": "org/base",
    "policy.parallelism.tp_size": 1,
    "policy.parallelism.dp_shard_size": 4,
}


def toml(keys: Mapping[str, Any]) -> str:
    """Dotted keys as TOML; JSON's scalars, lists and texts are TOML's too, tables are written inline."""
    return "".join(f"{key} = {_value(value)}\n" for key, value in keys.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_value(inner)}" for name, inner in value.items()) + "}"
    return json.dumps(value)


def converted(tmp_path: Path, keys: Mapping[str, Any], **options: Any) -> Conversion:
    """The conversion of BASE with `keys` (null takes a key of BASE out)."""
    merged = {key: value for key, value in {**BASE, **keys}.items() if value is not None}
    path = tmp_path / "config.toml"
    path.write_text(toml(merged), encoding="utf-8")
    return convert_file(path, **options)


def recipe_of(made: Conversion) -> dict[str, Any]:
    """The recipe as it reads back from its text."""
    return yaml.safe_load(made.text)


def at(recipe: Mapping[str, Any], path: str) -> Any:
    """What the recipe says at a dotted path, None if nothing."""
    value: Any = recipe
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def entry(made: Conversion, key: str) -> Any:
    return next(item for item in made.entries if item.key == key)
