"""What a recipe may say of the reward `model`: a reward model or a judge in the `reward` group. No torch.

The model itself is made in `hpc_rl/scoring`, which is a role's room.
"""

from __future__ import annotations

import re
import string
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hpc_rl.recipe.extensions import Served
from hpc_rl.recipe.schema import Positive

RATE = """Rate how good the answer is from 0 (useless) to 10 (perfect).

[Question]
{prompt}

[Answer]
{response}

Write one line and nothing else: Score: <number>"""
ASK = """Is the answer to the question correct, helpful and honest?

[Question]
{prompt}

[Answer]
{response}

Reply with Yes or No and nothing else."""
SCORE_LINE = r"Score:\s*([-+]?\d+(?:\.\d+)?)"
_GIVEN = ("prompt", "response", "answer")
_JUDGE_ONLY = ("value", "template", "pattern", "max_tokens", "yes", "no", "system")


class ModelConfig(Served):
    """`classifier`: output `label` of a sequence classifier for the chat (prompt and answer).

    `judge`: a causal model is asked with `template` (Python's `str.format`: prompt, response, answer, columns
    of the row). Its `value` is the last number that `pattern` finds in its greedy reply, or is made from the
    log-probs of `yes` and `no` as its first token: their `log_odds`, or the `probability` of yes.
    """

    path: str
    kind: Literal["classifier", "judge"] = "classifier"
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    max_length: Positive | None = None
    batch_tokens: Positive = 16384
    label: int | None = Field(default=None, ge=0)
    value: Literal["number", "probability", "log_odds"] = "number"
    template: str | None = None
    system: str | None = None
    pattern: str = SCORE_LINE
    max_tokens: Positive = 256
    yes: str = "Yes"
    no: str = "No"

    @field_validator("pattern")
    @classmethod
    def _has_one_group(cls, value: str) -> str:
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        if groups != 1:
            raise ValueError("must have exactly one group: the number")
        return value

    @field_validator("template")
    @classmethod
    def _shows_the_response(cls, value: str | None) -> str | None:
        if value is None:
            return value
        names = template_fields(value)
        if "response" not in names:
            raise ValueError("must show the judge the {response}")
        if any(not name.isidentifier() for name in names):
            raise ValueError(
                "may name {prompt}, {response}, {answer} and columns of the row, and nothing else"
            )
        return value

    @model_validator(mode="after")
    def _agree(self) -> ModelConfig:
        said = self.model_fields_set
        if self.kind == "classifier":
            wrong = [key for key in _JUDGE_ONLY if key in said and getattr(self, key) != _default(key)]
            if wrong:
                raise ValueError(f"{wrong[0]} is for kind: judge; a classifier has label")
        elif self.label is not None:
            raise ValueError("label is for kind: classifier; a judge has template and value")
        if self.kind == "judge" and self.value == "number":
            if self.yes != _default("yes") or self.no != _default("no"):
                raise ValueError("yes and no are for value: probability and value: log_odds")
        elif self.kind == "judge" and (
            self.pattern != SCORE_LINE or self.max_tokens != _default("max_tokens")
        ):
            raise ValueError(f"value {self.value} reads one token; pattern and max_tokens are for number")
        return self

    @property
    def question(self) -> str:
        """The judge's template: the recipe's, or the one that asks for `value`."""
        return self.template or (RATE if self.value == "number" else ASK)

    def needs(self) -> list[str]:
        """What of the row the judge's template shows, beside prompt and response."""
        if self.kind != "judge":
            return []
        return [name for name in template_fields(self.question) if name not in ("prompt", "response")]

    def text(self, prompt: str, response: str, answer: str | None, fields: dict[str, Any]) -> str:
        """What the judge is asked. Raises KeyError naming a column that the row lacks."""
        given = {**fields, "prompt": prompt, "response": response, "answer": answer or ""}
        return self.question.format_map(given)


def template_fields(template: str) -> list[str]:
    """The names in braces. Raises ValueError for a brace without its other."""
    try:
        found = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{error} (a brace that is text is written twice: {{{{ or }}}})") from error
    return list(dict.fromkeys(found))


def _default(key: str) -> Any:
    return ModelConfig.model_fields[key].default
