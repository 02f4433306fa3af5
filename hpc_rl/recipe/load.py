"""Load a recipe: layers, overrides, plugins, schema, extensions, cross-field checks.

`load_recipe` is the only way in; everything that is wrong is reported at once, as one RecipeError.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_rl.recipe.checks import blamed, cross_checks
from hpc_rl.recipe.extensions import REWARD_KEYS, UnknownExtension, options_of, registry
from hpc_rl.recipe.launch.script import bind
from hpc_rl.recipe.layers import apply_overrides, find_recipe, read_layers
from hpc_rl.recipe.messages import validate
from hpc_rl.recipe.plugins import (
    PluginError,
    copy_plugins,
    import_plugin,
    is_file_plugin,
    locate,
    plugin_source,
)
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.unknown import Unknown, not_explained, without_unknown
from hpc_rl.recipe.yaml_source import KeyPath, Problem, RecipeError, Source, dotted

_DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow", ".csv")


@dataclass
class LoadedRecipe:
    """A valid recipe and where it came from.

    `recipe` has every default and every local path absolute (`output_root` excepted: the plan
    settles it). `plugins` are module names and files as found here; `recipe.plugins` holds the
    names under which a run finds them again in its `code/`.
    """

    recipe: Recipe
    source: Source
    path: Path
    plugins: list[str | Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    @property
    def resolved(self) -> dict[str, Any]:
        """The complete recipe as plain data."""
        return self.recipe.model_dump(mode="json")

    def where(self, *path: str | int) -> str:
        """`file:line` of a key, or of its nearest written parent."""
        place = self.source.where(path)
        return str(place) if place else str(self.path)

    def problem(self, message: str, *path: str | int) -> Problem:
        """A Problem at `path`, for checks that run after loading."""
        place = blamed(self.source, path)
        return Problem(str(place) if place else str(self.path), dotted(path), message)

    def written(self, *path: str | int) -> bool:
        """True when the recipe (or an override) says something at `path` itself."""
        return path in self.source.places


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, merge and validate a recipe; `path` is a file or the name of a shipped recipe.

    Raises RecipeError with one Problem per mistake: file, line, key, bad value, what is allowed.
    """
    try:
        file = find_recipe(str(path), Path.cwd())
    except FileNotFoundError as error:
        raise RecipeError([Problem("", "", str(error))]) from error
    source = apply_overrides(read_layers(file), list(overrides))
    with redirect_stdout(sys.stderr):  # stdout is the command's answer, maybe JSON; a plugin may print
        plugins, problems = _plugins(source)
    recipe, schema_problems = validate(Recipe, source.data, source)
    problems += schema_problems
    unknown: Unknown = []
    if recipe is None:
        recipe, unknown = without_unknown(source.data)
    if recipe is None:
        raise RecipeError(problems)
    with redirect_stdout(sys.stderr):
        found = _Extensions(recipe, source).check()
    found += cross_checks(recipe, source)
    problems += not_explained(found, unknown)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    _localise(recipe, source)
    recipe.plugins = [plugin.name if isinstance(plugin, Path) else plugin for plugin in plugins]
    bind(recipe)
    return LoadedRecipe(recipe, source, file, plugins, list(overrides))


def save_plugins(loaded: LoadedRecipe, code_dir: Path) -> None:
    """Copy the recipe's `.py` plugins into the run's `code/`."""
    copy_plugins(loaded.plugins, code_dir)


def _at(source: Source, path: KeyPath, message: str) -> Problem:
    place = source.where(path)
    return Problem(str(place) if place else "", dotted(path), message)


def _plugins(source: Source) -> tuple[list[str | Path], list[Problem]]:
    """Find and import the plugins, so that the extensions they register are known below."""
    listed = source.data.get("plugins")
    found: list[str | Path] = []
    problems: list[Problem] = []
    for index, name in enumerate(listed if isinstance(listed, list) else []):
        if not isinstance(name, str):
            continue  # the schema says so
        place = source.where(("plugins", index))
        folder = place.folder if place else Path.cwd()
        try:
            plugin = locate(name, folder) if is_file_plugin(name) else name
            if isinstance(plugin, Path) and any(isinstance(p, Path) and p.name == plugin.name for p in found):
                raise PluginError(f"two plugin files are called {plugin.name!r}; rename one")
            import_plugin(plugin)
            found.append(plugin)
        except PluginError as error:
            problems.append(_at(source, ("plugins", index), str(error)))
    return found, problems


class _Extensions:
    """Validates the extensions' sections by their own configs and writes their defaults."""

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self.recipe = recipe
        self.source = source
        self.problems: list[Problem] = []

    def check(self) -> list[Problem]:
        recipe = self.recipe
        if recipe.supervised and not recipe.algorithm.get("name"):
            recipe.algorithm = {"name": "sft" if recipe.kind == "sft" else "dpo", **recipe.algorithm}
        recipe.algorithm = self._section("algorithms", recipe.algorithm, ("algorithm",))
        for index, item in enumerate(recipe.reward):
            common = self._common(item, index)
            options = {key: value for key, value in item.items() if key not in ("limit_s", "memory_gb")}
            section = self._section("rewards", options, ("reward", index))
            recipe.reward[index] = {"name": section.pop("name"), **common, **section}
        if recipe.simulator is not None:
            recipe.simulator = self._section("simulators", recipe.simulator, ("simulator",))
        policy, rollout = recipe.policy, recipe.rollout
        at: KeyPath = ("policy", "trainer_options")
        policy.trainer_options = self._options("trainers", policy.trainer, policy.trainer_options, at, at[:1])
        if rollout is not None:
            at = ("rollout", "engine_options")
            rollout.engine_options = self._options(
                "engines", rollout.engine, rollout.engine_options, at, at[:1]
            )
            transport = rollout.weights.transport
            if transport != "auto":
                at = ("rollout", "weights")
                self._options("transports", transport, {}, at, at)
        return self.problems

    def _common(self, item: dict[str, Any], index: int) -> dict[str, Any]:
        """What every reward may say: its weight, and its limits where they are written."""
        common = {"weight": 1.0, **{key: item[key] for key in REWARD_KEYS if key in item}}
        for key, value in common.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                self._bad("must be a number", "reward", index, key)
            elif key != "weight" and not (0 < value < math.inf):
                self._bad("must be greater than 0", "reward", index, key)
        return common

    def _bad(self, message: str, *path: str | int) -> None:
        self.problems.append(_at(self.source, path, message))

    def _section(self, kind: str, mapping: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        """A section `{name: ..., **options}` with its defaults."""
        name = mapping.get("name")
        if not isinstance(name, str):
            self._bad("is required and missing" if name is None else "must be text", *path, "name")
            return {"name": name}
        also = ("name", *REWARD_KEYS) if kind == "rewards" else ("name",)
        return {"name": name, **self._options(kind, name, mapping, path, path, also)}

    def _options(
        self,
        kind: str,
        name: str,
        mapping: dict[str, Any],
        path: KeyPath,
        owner: KeyPath,
        also: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """The options at `path`, validated. `owner` is the section that names the extension; `also`: the
        keys of that section that are not the extension's."""
        try:
            cls = registry(kind).config_class(name)
        except UnknownExtension as error:
            key = {"trainers": "trainer", "engines": "engine", "transports": "transport"}.get(kind, "name")
            self._bad(str(error), *owner, key)
            return {}
        except (ImportError, TypeError) as error:  # a plugin whose config is not there, or is no config
            self._bad(f"{kind} extension {name!r} cannot be used: {error}", *path)
            return {}
        config, found = validate(cls, options_of(cls, mapping), self.source, path, also=also)
        self.problems.extend(found)
        return config.model_dump(mode="json") if config else {}


def _localise(recipe: Recipe, source: Source) -> None:
    """Make local paths absolute; a Hugging Face Hub name stays as it is."""

    def absolute(value: str, path: KeyPath, *, always: bool = False) -> str:
        place = source.where(path)
        folder = place.folder if place else Path.cwd()
        candidate = Path(os.path.expanduser(value))
        local = always or value.startswith((".", "/", "~")) or value.endswith(_DATA_SUFFIXES)
        target = candidate if candidate.is_absolute() else folder / candidate
        try:
            return str(target.resolve()) if local or target.exists() else value
        except (OSError, ValueError, RuntimeError):
            # Too long, a NUL in it, links in a circle: no file has this name, and who opens it says so.
            return value

    recipe.model.path = absolute(recipe.model.path, ("model", "path"))
    if recipe.model.tokenizer is not None:
        recipe.model.tokenizer = absolute(recipe.model.tokenizer, ("model", "tokenizer"))
    if recipe.model.lora is not None and recipe.model.lora.adapter is not None:
        recipe.model.lora.adapter = absolute(recipe.model.lora.adapter, ("model", "lora", "adapter"))
    if recipe.policy.reference.path is not None:
        named: KeyPath = ("policy", "reference", "path")
        recipe.policy.reference.path = absolute(recipe.policy.reference.path, named)
    for which, spec in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        if spec is not None:
            plugin = plugin_source(spec.path)
            if plugin is None:
                spec.path = absolute(spec.path, ("data", which, "path"))
            elif plugin[1]:
                spec.path = f"plugin:{plugin[0]}:{absolute(plugin[1], ('data', which, 'path'))}"
            if spec.media_path:  # LLaVA writes none as an empty text
                spec.media_path = absolute(spec.media_path, ("data", which, "media_path"), always=True)
    if recipe.teacher is not None:
        recipe.teacher.path = absolute(recipe.teacher.path, ("teacher", "path"))
    for index, item in enumerate(recipe.reward):
        if item["name"] == "model":
            for key in ("path", "tokenizer"):
                if item[key] is not None:
                    item[key] = absolute(item[key], ("reward", index, key))
    if recipe.eval.checkpoint is not None:
        recipe.eval.checkpoint = absolute(recipe.eval.checkpoint, ("eval", "checkpoint"), always=True)
    if recipe.cluster.template is not None:
        recipe.cluster.template = absolute(recipe.cluster.template, ("cluster", "template"))
    site = recipe.cluster.site
    if "/" in site or site.endswith((".yaml", ".yml")):
        recipe.cluster.site = absolute(site, ("cluster", "site"), always=True)
    redis = recipe.cluster.controller.redis_server
    if redis is not None and "/" in redis:
        path: KeyPath = ("cluster", "controller", "redis_server")
        recipe.cluster.controller.redis_server = absolute(redis, path, always=True)
