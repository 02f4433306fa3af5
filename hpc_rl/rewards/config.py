"""What a recipe may say about each built-in reward (besides `name` and `weight`). Torch-free."""

from __future__ import annotations

from hpc_rl.recipe.schema import Section


class Gsm8kConfig(Section):
    """1 when the number after the last `####` equals the reference's."""


class FormatConfig(Section):
    """1 when the answer matches `pattern` (regular expression, searched)."""

    pattern: str = r"####\s*-?[0-9][0-9,.]*\s*\Z"


class ExactConfig(Section):
    """1 when the answer equals the reference, white space trimmed."""

    ignore_case: bool = False


class ContainsConfig(Section):
    """1 when the answer contains the reference."""

    ignore_case: bool = False
