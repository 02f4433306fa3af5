"""Launch scripts written for cosmos-rl, as plugins of a recipe (docs/convert.md)."""

from hpc_rl.recipe.launch.script import ScriptError, launch_worker

__all__ = ["ScriptError", "launch_worker"]
