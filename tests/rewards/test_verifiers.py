"""The built-in rewards: what counts as right."""

from __future__ import annotations

from decimal import Decimal

import pytest
from pydantic import ValidationError

from hpc_rl.recipe.extensions import registry
from hpc_rl.rewards.base import RewardError, RewardSpec, checked, make_reward, reward_specs
from hpc_rl.rewards.config import ExactConfig, FormatConfig
from hpc_rl.rewards.gsm8k import number_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 + 5.\n#### 10", "10"),
        ("#### $1,234.50 dollars", "1234.5"),
        ("####-7", "-7"),
        ("#### 3 #### 4", "4"),
        ("#### 18.", "18"),
        ("#### $ 12", "12"),
        ("####\n42", "42"),
        ("#### −0", "0"),
        ("#### −1,000", "-1000"),
        ("#### ten", None),
        ("the answer is 10", None),
        ("", None),
    ],
)
def test_number_after_hashes(text: str, number: str | None) -> None:
    assert number_of(text, "hashes") == (None if number is None else Decimal(number))


def test_last_number() -> None:
    assert number_of("first 3, then 1,200 apples.", "last_number") == 1200
    assert number_of("$5.50", "last_number") == Decimal("5.5")
    assert number_of("none", "last_number") is None
    assert number_of("9" * 100_000, "last_number") is None  # quickly, and no match


def score(name: str, response_text: str, answer: str | None = None, **options: object) -> float:
    return make_reward(RewardSpec(name, name, 1.0, options))("prompt", response_text, answer, {})


def test_gsm8k() -> None:
    assert score("gsm8k", "#### 1,000", "48+952\n#### 1000") == 1.0
    assert score("gsm8k", "#### 1000.0", "1000") == 1.0  # prepared data: a bare number
    assert score("gsm8k", "it is 1000", "#### 1000") == 0.0
    assert score("gsm8k", "it is 1000", "#### 1000", response="last_number") == 1.0
    with pytest.raises(ValueError, match="needs the row's answer"):
        score("gsm8k", "#### 1")
    with pytest.raises(ValueError, match="no number in the row's answer 'many'"):
        score("gsm8k", "#### 1", "many")


def test_format() -> None:
    assert score("format", "thus\n#### 12\n") == 1.0
    assert score("format", "thus\n#### 12\nand more") == 0.0, "it must end there"
    assert score("format", "#### 12 apples") == 0.0
    assert score("format", "12") == 0.0
    assert score("format", "<think>x</think>", pattern="</think>$") == 1.0


def test_exact_and_contains() -> None:
    assert score("exact", " Yes \n", "Yes") == 1.0
    assert score("exact", "yes", "Yes") == 0.0
    assert score("exact", "yes", "Yes", ignore_case=True) == 1.0
    assert score("exact", "a=12;", "12", pattern=r"a=(\d+)") == 1.0
    assert score("exact", "b", "12", pattern=r"a=(\d+)") == 0.0
    assert score("contains", "it is Paris.", "Paris") == 1.0
    assert score("contains", "x", "Paris", text="X", ignore_case=True) == 1.0
    with pytest.raises(ValueError, match="needs `text`"):
        score("contains", "x")


def test_bad_options_are_refused_at_submission() -> None:
    with pytest.raises(ValidationError, match="no regular expression"):
        FormatConfig(pattern="(")
    with pytest.raises(ValidationError, match="exactly one group"):
        ExactConfig(pattern="a")
    assert set(registry("rewards").names()) >= {"gsm8k", "format", "exact", "contains"}


def test_specs_have_unique_keys_and_values_are_checked() -> None:
    specs = reward_specs([{"name": "format"}, {"name": "format", "weight": 0.5, "pattern": "x"}])
    assert [(s.key, s.weight, s.options) for s in specs] == [
        ("format", 1.0, {}),
        ("format_2", 0.5, {"pattern": "x"}),
    ]
    assert checked(specs[0], True) == 1.0
    for value in (float("nan"), None, "1"):
        with pytest.raises(RewardError, match="finite number"):
            checked(specs[0], value)
