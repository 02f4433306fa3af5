"""Write the key tables of docs/recipe.md and docs/site.md from the schemas: run it as a script."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402

from hpc_rl.plan.site import Site  # noqa: E402
from hpc_rl.recipe.extensions import registry  # noqa: E402
from hpc_rl.recipe.schema import Recipe  # noqa: E402

ALGORITHMS = (
    *("dr_grpo", "dapo", "gspo", "cispo", "aipo", "rloo"),
    *("reinforce_pp", "reinforce_pp_baseline", "maxrl", "distill"),
)
_NAMES = {str: "text", int: "integer", float: "number", bool: "true/false", type(None): "null", Any: "any"}


def kind(annotation: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inner[0])
    if origin is Literal:
        return ", ".join(str(value) for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in inner)
    if origin in (list, tuple):
        return f"list of {kind(inner[0])}"
    if origin is dict:
        return (
            f"{kind(inner[0])} -> {kind(inner[1])}"
            if get_origin(inner[0]) is not Literal
            else f"role -> {kind(inner[1])}"
        )
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES.get(annotation, str(annotation))


def rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    """One table line per key; sections are opened."""
    lines: list[str] = []
    for name, info in model.model_fields.items():
        section = next(
            (
                t
                for t in (info.annotation, *get_args(info.annotation))
                if isinstance(t, type) and issubclass(t, BaseModel)
            ),
            None,
        )
        if section is not None:
            lines += rows(section, f"{prefix}{name}.")
            continue
        if info.default is PydanticUndefined:
            default = "required" if info.default_factory is None else ""
        else:
            default = f"`{json.dumps(info.default, default=str)}`"
        lines.append(f"| `{prefix}{name}` | {kind(info.annotation)} | {default} |")
    return lines


def table(model: type[BaseModel], prefix: str = "") -> str:
    return "\n".join(["| key | value | default |", "|---|---|---|", *rows(model, prefix)])


def differences(names: Sequence[str], base: str) -> str:
    """One table line per algorithm: the keys that `base` has not, or has with another value or default."""

    def keys(name: str) -> dict[str, tuple[str, str]]:
        lines = rows(registry("algorithms").config_class(name))
        split = (line.strip("|").split("|") for line in lines)
        return {key.strip(): (value.strip(), default.strip()) for key, value, default in split}

    common = keys(base)
    lines = [
        "| `algorithm.name` | keys that differ: value, default | keys that are not there |",
        "|---|---|---|",
    ]
    for name in names:
        own = keys(name)
        other = [f"{key}: {', '.join(own[key])}" for key in own if own[key] != common.get(key)]
        missing = [key for key in common if key not in own]
        lines.append(f"| `{name}` | {'; '.join(other) or 'none'} | {', '.join(missing) or 'none'} |")
    return "\n".join(lines)


def tables() -> dict[str, dict[str, str]]:
    """page -> marker -> table."""
    recipe = {
        "recipe": table(Recipe),
        "grpo": table(registry("algorithms").config_class("grpo"), "algorithm."),
        "algorithms": differences(ALGORITHMS, "grpo"),
        "dpo": table(registry("algorithms").config_class("dpo"), "algorithm."),
    }
    for name in ("vllm", "hf"):
        recipe[name] = table(registry("engines").config_class(name), "rollout.engine_options.")
    return {"recipe.md": recipe, "site.md": {"site": table(Site)}}


def filled(page: str, text: str) -> str:
    """`text` with every table between its markers renewed."""
    for marker, content in tables()[page].items():
        start, end = f"<!-- keys: {marker} -->", "<!-- end -->"
        before, found, rest = text.partition(start)
        if not found or end not in rest:
            raise ValueError(f"docs/{page} lacks {start} ... {end}")
        text = f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"
    return text


def main() -> None:
    for page in tables():
        path = ROOT / "docs" / page
        path.write_text(filled(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
