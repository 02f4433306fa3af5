"""Write a recipe as YAML that reads back to an equal recipe: `resolved.yaml` of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hpc_rl.recipe.messages import validate
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import RecipeError, plain_scalar, read_yaml

_Base: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class _Dumper(_Base):  # type: ignore[misc]
    """PyYAML quotes what YAML 1.1 would misread; our reader follows 1.2, so quote for both."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: Any, value: str) -> Any:
    quoted = plain_scalar(value) != value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if quoted else None)


_Dumper.add_representer(str, _text)


def dump_yaml(data: Any) -> str:
    """Plain data as YAML text, keys in the order given."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110))


def flow_yaml(data: Any) -> str:
    """Plain data as YAML on one line, as it may stand behind a key or inside a flow mapping."""
    text = yaml.dump([data], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**9,
                     default_flow_style=True)  # fmt: skip
    return str(text).strip()[1:-1]


def dump_resolved(recipe: Recipe) -> str:
    """The complete recipe, every default written. `extends` is spent and becomes null."""
    data = recipe.model_dump(mode="json")
    data["extends"] = None
    return dump_yaml(data)


def read_resolved(path: Path) -> Recipe:
    """Read a file that `dump_resolved` wrote. No layers, no plugins are imported, extension sections
    are taken as they are. Raises RecipeError."""
    source = read_yaml(path)
    recipe, problems = validate(Recipe, source.data, source)
    if recipe is None:
        raise RecipeError(problems)
    return recipe
