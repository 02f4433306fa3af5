"""Reading a run's settings back from its directory: the resolved recipe, and the user's plugins."""

from __future__ import annotations

import sys

from hpc_rl.recipe.dump import read_resolved
from hpc_rl.recipe.launch.script import bind
from hpc_rl.recipe.plugins import import_plugins
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir, RunError


def load_run(run: RunDir, *, plugins: bool = False) -> Recipe:
    """The recipe as it was resolved at submission; with `plugins`, the user's modules are imported.

    Plugins come from the run's own copy in `<run>/code`, which is put on `sys.path` too, for what they
    import later. Raises RunError if this is not a run directory, PluginError for a broken plugin.
    """
    if not run.resolved.is_file():
        raise RunError(f"{run.root} is not a run directory: it has no resolved.yaml")
    recipe = read_resolved(run.resolved)
    if plugins:
        import_plugins(recipe.plugins, run.code)
        bind(recipe)
        if str(run.code) not in sys.path:
            sys.path.insert(0, str(run.code))
    return recipe
