"""cosmos-rl's TOML files: what their keys are, and what they become in a recipe (`hpc-rl convert`)."""

from hpc_rl.recipe.cosmos.convert import Conversion, convert_file

__all__ = ["Conversion", "convert_file"]
