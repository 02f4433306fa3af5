"""What the user asked for: the schema, loading, `extends`, overrides, extensions and messages."""

from hpc_rl.recipe.dump import dump_resolved, read_resolved
from hpc_rl.recipe.load import LoadedRecipe, load_recipe, save_plugins
from hpc_rl.recipe.plugins import import_plugins
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import Problem, RecipeError

__all__ = [
    "LoadedRecipe",
    "Problem",
    "Recipe",
    "RecipeError",
    "dump_resolved",
    "import_plugins",
    "load_recipe",
    "read_resolved",
    "save_plugins",
]
