"""Reading a run's settings back from its directory: the resolved recipe, and the user's plugins."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import yaml

from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir, RunError


def load_run(run: RunDir, *, plugins: bool = False) -> Recipe:
    """The recipe as it was resolved at submission; with `plugins`, the user's modules are imported.

    Puts `<run>/code` first on `sys.path`, so that plugins come from the run's own copy. Raises
    RunError if this is not a run directory or a plugin cannot be imported.
    """
    try:
        recipe = Recipe.model_validate(yaml.safe_load(run.resolved.read_text()))
    except FileNotFoundError as error:
        raise RunError(f"{run.root} is not a run directory: it has no resolved.yaml") from error
    if str(run.code) not in sys.path:
        sys.path.insert(0, str(run.code))
    if plugins:
        import_plugins(recipe)
    return recipe


def import_plugins(recipe: Recipe) -> None:
    """Import each of `plugins:` so that it registers its extensions."""
    for plugin in recipe.plugins:
        module = Path(plugin).stem if plugin.endswith(".py") else plugin
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise RunError(f"plugin {plugin!r} cannot be imported: {error}") from error
