"""What a recipe may say in its `reward` list, beside `name` and `weight`. No torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator

from hpc_rl.recipe.schema import Section

NUMBER_LINE = r"(?m:^)\s*####\s*\$?[-+]?\$?\d[\d,]*(?:\.\d+)?\s*\Z"
"""A last line `#### <number>`, as GSM8K's answers end."""


class Gsm8kConfig(Section):
    """1.0 if the response's number equals the reference's.

    `response` and `reference` say where the number stands: after the last `####`, or the last number.
    """

    response: Literal["hashes", "last_number"] = "hashes"
    reference: Literal["hashes", "last_number"] = "hashes"


class FormatConfig(Section):
    """1.0 if `pattern` (a Python regular expression) is found in the response.

    The default asks for a response that ends with GSM8K's line `#### <number>`.
    """

    pattern: str = NUMBER_LINE

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return value


class ExactConfig(Section):
    """1.0 if the response is the row's answer; `pattern` with one group picks the part to compare."""

    strip: bool = True
    ignore_case: bool = False
    pattern: str | None = None

    @field_validator("pattern")
    @classmethod
    def _has_one_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError("must have exactly one group: the part to compare")
        return value


class ContainsConfig(Section):
    """1.0 if the response contains `text`, or the row's answer where `text` is null."""

    text: str | None = None
    ignore_case: bool = False
