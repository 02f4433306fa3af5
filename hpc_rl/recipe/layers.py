"""From files to one mapping: `extends` chains merged from the base up, then `a.b=value` overrides.

Mappings merge key by key, everything else is replaced. When a section names another extension
(`algorithm.name`, `rollout.engine`), its base's options are dropped, not mixed in; a key that
excludes another (`steps` and `epochs`) removes the one that a lower layer set.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hpc_rl.recipe.messages import is_secret, nearest
from hpc_rl.recipe.share import share_dir
from hpc_rl.recipe.yaml_source import (
    KeyPath,
    Places,
    Problem,
    RecipeError,
    Source,
    Where,
    dotted,
    parse_value,
    read_yaml,
)

# section -> keys of which a higher layer's choice removes the lower layer's
_EXCLUSIVE: list[tuple[KeyPath, KeyPath]] = [
    (("policy", "steps"), ("policy", "epochs")),
    (("policy", "micro_batch_size"), ("policy", "micro_batch_tokens")),
]
# (path of a name, path of the options that belong to that name; None: the rest of the section)
_NAMED: list[tuple[KeyPath, KeyPath | None]] = [
    (("algorithm", "name"), None),
    (("simulator", "name"), None),
    (("rollout", "engine"), ("rollout", "engine_options")),
    (("policy", "trainer"), ("policy", "trainer_options")),
]


def find_recipe(name: str, folder: Path) -> Path:
    """A recipe file by path (relative to `folder`) or by the name of a shipped one.

    Raises FileNotFoundError that lists the shipped names (for a folder: the recipes in it).
    """
    path = Path(os.path.expanduser(name))  # of an unknown ~user: as it is, and so not there
    path = path if path.is_absolute() else folder / path
    if path.is_file():
        return path
    shipped = share_dir("recipes")
    for candidate in (shipped / name, shipped / f"{name}.yaml"):
        if candidate.is_file() and candidate.resolve().parent == shipped.resolve():
            return candidate
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    if path.is_dir():
        inside = sorted(file.name for pattern in ("*.yaml", "*.yml") for file in path.glob(pattern))
        there = f"recipes in it: {', '.join(inside[:8])}" if inside else "there is no .yaml file in it"
        raise FileNotFoundError(f"{str(path)!r} is a folder, not a recipe file; {there}")
    beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    guess = nearest(path.name, beside) or nearest(path.name.removesuffix(".yaml"), names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    raise FileNotFoundError(f"no recipe file {str(path)!r}.{hint} Shipped recipes: {', '.join(names)}")


def read_layers(path: Path) -> Source:
    """The recipe at `path` with everything it extends. Raises RecipeError (also for a cycle)."""
    chain: list[tuple[Path, Source]] = []
    while True:
        resolved = path.resolve()
        seen = [str(file) for file, _ in chain]
        if str(resolved) in seen:
            source = chain[-1][1]
            loop = " -> ".join([*seen[seen.index(str(resolved)) :], str(resolved)])
            where = str(source.where(("extends",)))
            raise RecipeError([Problem(where, "extends", f"goes round in a circle: {loop}")])
        source = read_yaml(path)
        chain.append((resolved, source))
        base = source.data.get("extends")
        if base is None:
            break
        where = str(source.where(("extends",)))
        if not isinstance(base, str):
            raise RecipeError([Problem(where, "extends", "must be one file or the name of a shipped recipe")])
        try:
            path = find_recipe(base, resolved.parent)
        except FileNotFoundError as error:
            raise RecipeError([Problem(where, "extends", str(error))]) from error
    merged = chain[-1][1]
    for _, source in reversed(chain[:-1]):
        merged = merge(merged, source)
    return merged


def merge(base: Source, top: Source) -> Source:
    """`top` laid over `base`."""
    data = _copy(base.data)
    places = dict(base.places)
    for name, options in _NAMED:
        if _get(top.data, name) is not None and _get(top.data, name) != _get(data, name):
            _remove(data, places, options if options is not None else name[:-1])
    for one, other in _EXCLUSIVE:
        for new, old in ((one, other), (other, one)):
            if _get(top.data, new) is not None and _get(top.data, old) is None:
                _remove(data, places, old)
    _merge_into(data, places, top.data, top.places, ())
    return Source(data, places)


def _merge_into(
    data: dict[str, Any], places: Places, top: dict[str, Any], top_places: Places, at: KeyPath
) -> None:
    for key, value in top.items():
        path = (*at, key)
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _merge_into(data[key], places, value, top_places, path)
        else:
            _remove_places(places, path)
            data[key] = _copy(value)
            places.update({old: place for old, place in top_places.items() if old[: len(path)] == path})
        if path in top_places:
            places[path] = top_places[path]


def apply_overrides(source: Source, overrides: list[str]) -> Source:
    """The source with `a.b=value` texts applied in order. Raises RecipeError."""
    problems: list[Problem] = []
    for text in overrides:
        try:
            source = _apply(source, text)
        except ValueError as error:
            problems.append(Problem(f"override '{shown_override(text)}'", "", str(error)))
    if problems:
        raise RecipeError(problems)
    return source


def shown_override(text: str) -> str:
    """The override as it may appear in a message: a value that may be a secret is hidden."""
    key, mark, value = text.partition("=")
    path: KeyPath = tuple(key.split("."))
    names = re.findall(r"([\w-]+)['\"]?\s*[:=]", value)  # keys inside the value, as in variables={X_TOKEN: …}
    hidden = is_secret(path) or is_secret(tuple(names)) or "secrets" in names
    return f"{key}{mark}(hidden)" if hidden else f"{key}{mark}{value}"


def _apply(source: Source, text: str) -> Source:
    key, mark, raw = text.partition("=")
    parts = key.strip().split(".")
    if not mark or not all(parts):
        raise ValueError("must look like a.b=value, for example policy.steps=10")
    if parts == ["extends"]:
        raise ValueError("must be written in the recipe file; it cannot be changed by an override")
    path: list[str | int] = []
    origin = f"override '{shown_override(text)}'"
    value, inner = parse_value(raw, origin)
    current: Any = source.data
    for part in parts:
        if isinstance(current, list):
            path.append(_index(part, current, path))
            current = current[path[-1]] if path[-1] < len(current) else None  # type: ignore[operator, index]
        else:
            path.append(part)
            current = current.get(part) if isinstance(current, dict) else None
    own: Places = {(*path, *below): place for below, place in inner.items()}
    if all(isinstance(part, str) for part in path):
        nested: Any = value
        for name in reversed(path):
            nested = {name: nested}
        above: Places = {tuple(path[:end]): Where(origin, None, Path.cwd()) for end in range(1, len(path))}
        merged = merge(source, Source(nested, {**above, **own}))
        # A mapping above was written in the file, and only the value is the override's; where the file had
        # no mapping, the override made one of it.
        kept = [old for old in above if isinstance(_get(source.data, old), dict)]
        merged.places.update({old: source.places[old] for old in kept if old in source.places})
        return merged
    return _set_in_list(source, path, value, own)


def _index(part: str, items: list[Any], path: list[str | int]) -> int:
    name = dotted(tuple(path))
    if not part.isdigit():
        raise ValueError(f"{name} is a list; use a number, for example {name}.0")
    if int(part) > len(items):
        raise ValueError(f"{name} has {len(items)} entries; index {part} is beyond its end")
    return int(part)


def _set_in_list(source: Source, path: list[str | int], value: Any, own: Places) -> Source:
    data = _copy(source.data)
    places = dict(source.places)
    target: Any = data
    for index, part in enumerate(path[:-1]):
        made: KeyPath = tuple(path[: index + 1])
        if isinstance(target, list) and part == len(target):
            target.append({})
            places[made] = own[tuple(path)]
        elif isinstance(target, dict) and not isinstance(target.get(str(part)), dict | list):
            target[str(part)] = {}
            places[made] = own[tuple(path)]
        target = target[part]
        if not isinstance(target, dict | list):
            raise ValueError(f"{dotted(tuple(path[: index + 1]))} is not a mapping")
    if isinstance(target, list) and path[-1] == len(target):
        target.append(value)
    else:
        target[path[-1]] = value
    _remove_places(places, tuple(path))
    places.update(own)
    return Source(data, places)


def _get(data: Any, path: KeyPath) -> Any:
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return None
        data = data[part]
    return data


def _remove(data: dict[str, Any], places: Places, path: KeyPath) -> None:
    parent = _get(data, path[:-1])
    if isinstance(parent, dict) and path[-1] in parent:
        parent.pop(path[-1])
        _remove_places(places, path)


def _remove_places(places: Places, path: KeyPath) -> None:
    for old in [old for old in places if old[: len(path)] == path]:
        del places[old]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return value
