"""What a recipe may say in its `reward` list (beside `REWARD_KEYS`). No torch."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from hpc_rl.recipe.schema import Positive, Section
from hpc_rl.rewards.model import ModelConfig

NUMBER_LINE = r"(?m:^)\s*####\s*\$?[-+−]?\$?\d[\d,]*(?:\.\d+)?\s*\Z"
"""A last line `#### <number>`, as GSM8K's answers end."""


class NeedsAnswer(Section):
    """The config of a reward that compares with the row's answer."""


def row_needs(config: BaseModel, answer: str | None, fields: dict[str, Any]) -> str | None:
    """What a reward with `config` lacks in a row with this answer and these columns; None: nothing."""
    if isinstance(config, NeedsAnswer) and (answer is None or not answer.strip()):
        return "needs the row's answer: set data.train.answer to the column that has it"
    if isinstance(config, ContainsConfig) and config.text is None and answer is None:
        return "needs `text`, or the row's answer: set data.train.answer to the column that has it"
    columns = []
    if isinstance(config, ModelConfig):
        columns = [name for name in config.needs() if name != "answer"]
        if "answer" in config.needs() and answer is None:
            return "shows the row's answer: set data.train.answer to the column that has it"
    elif isinstance(config, CodeConfig):
        columns = [config.tests, *([config.entry_point] if config.entry_point else [])]
    elif isinstance(config, SingleChoiceConfig) and config.options is not None:
        columns = [config.options]
    missing = [column for column in columns if column not in fields]
    if not missing:
        return None
    present = ", ".join(map(repr, fields)) or "none"
    return f"needs the row's column {missing[0]!r}; beside prompt and answer there are {present}"


class Gsm8kConfig(NeedsAnswer):
    """1.0 if the response's number equals the reference's.

    `response` and `reference` say where the number stands: after the last `####`, or the last number.
    """

    response: Literal["hashes", "last_number"] = "hashes"
    reference: Literal["hashes", "last_number"] = "hashes"


class MathConfig(NeedsAnswer):
    r"""1.0 if math-verify finds the response's last answer equal to the row's.

    `boxed`: only what stands in a `\boxed{}` is an answer. Numbers are equal to `digits` decimal places.
    """

    boxed: bool = False
    digits: int = Field(default=6, ge=0, le=50)


class BoxedConfig(NeedsAnswer):
    r"""1.0 if the last `\boxed{}` has the row's answer, compared as a number where both are one, else as
    text without spaces, units of `\text{}` and LaTeX's sizes. `fallback: last_number` takes the last number
    of a response without a box."""

    fallback: Literal["none", "last_number"] = "none"


class SingleChoiceConfig(NeedsAnswer):
    """1.0 if the response names the letter of the row's answer.

    `choices` are the letters there are. `options` is the column with the options' texts (a list, or a
    mapping of letter to text): naming the text alone counts too then.
    """

    choices: str = "ABCDEFGH"
    options: str | None = None

    @field_validator("choices")
    @classmethod
    def _letters(cls, value: str) -> str:
        if re.fullmatch(r"[A-Z]{2,26}", value) is None or len(set(value)) != len(value):
            raise ValueError("must be different capital letters, such as ABCD")
        return value


class FormatConfig(Section):
    """1.0 if the response has the shape that `style` names.

    `pattern` (a Python regular expression) is found in it; the default asks for a response that ends with
    GSM8K's line `#### <number>`. `think_answer`: it is `<think>...</think>` and then `<answer>...</answer>`,
    each tag exactly once, neither empty, nothing outside; `think`: `<think>...</think>` and then text.
    `prefilled`: the prompt ends with `<think>` already, and the response begins behind it.
    """

    style: Literal["pattern", "think_answer", "think"] = "pattern"
    pattern: str = NUMBER_LINE
    prefilled: bool = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _agree(self) -> FormatConfig:
        if self.style != "pattern" and self.pattern != NUMBER_LINE:
            raise ValueError(f"style {self.style} has no pattern; remove `pattern`, or set style: pattern")
        if self.style == "pattern" and self.prefilled:
            raise ValueError("prefilled is for style: think_answer and style: think")
        return self


class ExactConfig(NeedsAnswer):
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


class OverlongConfig(Section):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), times `penalty`: 0 up to
    `max_tokens - buffer` tokens, falling to -1 at `max_tokens` (null: the recipe's `rollout.max_tokens`)."""

    buffer: Positive
    max_tokens: Positive | None = None
    penalty: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> OverlongConfig:
        if self.max_tokens is not None and self.buffer > self.max_tokens:
            raise ValueError(f"buffer {self.buffer} is larger than max_tokens {self.max_tokens}")
        return self


class CodeConfig(Section):
    """1.0 if the response's last Python block passes the tests in the row's column `tests`.

    `partial` gives the share of the tests that pass. `entry_point` is the column that names the function
    which a test's `check(candidate)` is given. A process may run `run_s` seconds (and compute as long), all
    of a sample's together `total_s`; it may hold `memory_mb` and write `output_mb`.
    """

    tests: str = "tests"
    entry_point: str | None = None
    partial: bool = False
    run_s: float = Field(default=6.0, gt=0, le=3600)
    total_s: float = Field(default=20.0, gt=0, le=3600)
    memory_mb: int = Field(default=1024, ge=64, le=1 << 20)
    output_mb: int = Field(default=4, ge=1, le=1024)


class PythonConfig(Section):
    """`function` is `module:function`: an installed module, or a file listed under `plugins`."""

    function: str

    @field_validator("function")
    @classmethod
    def _reference(cls, value: str) -> str:
        if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value) is None:
            raise ValueError("must look like module:function")
        return value
