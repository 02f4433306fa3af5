"""The rewards that compare answers: what counts as the same, and where the answer stands."""

from __future__ import annotations

import time

import pytest
from pydantic import ValidationError

from hpc_rl.rewards.answers import final_part, last_boxed, reference_part, same
from hpc_rl.rewards.base import RewardSpec, SampleInfo, make_reward, row_checker
from hpc_rl.rewards.config import FormatConfig, OverlongConfig, PythonConfig, SingleChoiceConfig


def score(
    name: str, response: str, answer: str | None = None, fields: object = None, **options: object
) -> float:
    value = make_reward(RewardSpec(name, name, 1.0, options))("prompt", response, answer, fields or {})
    assert isinstance(value, float)
    return value


def test_where_the_answer_stands() -> None:
    assert final_part("<think>1</think> 2") == " 2"
    assert final_part("thinking</think><answer>3</answer> bye") == "3"  # the prompt ended with <think>
    assert final_part("<think>never ends: 4") == ""
    assert final_part("plain 5") == "plain 5"
    assert last_boxed(r"\boxed{1} so \boxed {\frac{1}{\sqrt{2}}} done") == r"\frac{1}{\sqrt{2}}"
    assert last_boxed(r"\boxed{\boxed{3}}") == r"\boxed{3}"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"\boxed{1} and \boxed{2") == "1", "the last one whose braces close"
    assert last_boxed("boxed{1}") is None
    assert reference_part("two\n#### 1,234") == "1,234"
    assert reference_part(r"so \boxed{7}.") == "7"
    assert reference_part(r" $\frac12$ ") == r"\frac12"
    assert reference_part("$1$ or $2$") == "$1$ or $2$"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("0.5", r"\frac{1}{2}"),
        ("0.50", r"\dfrac12"),
        ("1/2", ".5"),
        ("-0", "0"),
        ("−3", "-3"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        (r"\$18", "18"),
        (r"12\text{ cm}", "12"),
        (r"12\,\mathrm{cm}^2", "12"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"\text{Monday}", "Monday"),
        ("x = 5", "5"),
        (r"-\frac{1}{2}", "-0.5"),
        ("42.", "42"),
    ],
)
def test_the_same_answer(one: str, other: str) -> None:
    assert same(one, other) and same(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12", "1,2"),  # a list of two is no number
        ("0.3333", r"\frac{1}{3}"),
        ("1/0", "1"),
        ("-5", "5"),
        ("(1,2)", "(2,1)"),
        ("", "0"),
        ("3x", "3"),
        ("12", r"12\pi"),
    ],
)
def test_another_answer(one: str, other: str) -> None:
    assert not same(one, other)


def test_boxed() -> None:
    assert score("boxed", r"<think>\boxed{1}</think> thus \boxed{2}", "2") == 1.0
    assert score("boxed", r"\boxed{2} no, \boxed{3}", "2") == 0.0
    assert score("boxed", "it is 2", "2") == 0.0
    assert score("boxed", "it is −2.0", "-2", fallback="last_number") == 1.0
    assert score("boxed", r"\boxed{1000}", "48+952\n#### 1,000") == 1.0
    with pytest.raises(ValueError, match="needs the row's answer"):
        score("boxed", r"\boxed{2}", "")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("the answer is 1,234", "1234"),
        (r"\boxed{1{,}234}", "1234"),
        (r"\boxed{1234}", "1,234"),
        (r"thus $\frac{2}{4}$", "1/2"),
        (r"\boxed{0.5}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
        (r"\boxed{x^2+2x+1}", "$(x+1)^2$"),
        (r"\boxed{\{3, 1, 2\}}", r"\{1,2,3\}"),
        (r"\boxed{[0, 1) \cup (2, \infty)}", r"[0,1)\cup(2,\infty)"),
        (r"\boxed{(1, 2)}", "(1,2)"),
        (r"\boxed{-0}", "0"),
        (r"\boxed{−7}", "-7"),
        (r"\boxed{12 \text{ cm}}", "12"),
        (r"\boxed{1} is wrong, so \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\frac{1}{3}}}", "3"),
        (r"\boxed{2, 1}", "1,2"),  # a set, and no number with a decimal comma
        (r"\boxed{x=5}", "5"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{\text{Monday}}", "Monday"),
        ("#### 18", "9*2\n#### 18"),
        (r"<think>perhaps \boxed{4}</think>\boxed{5}", "5"),
    ],
)
def test_math_right(response: str, answer: str) -> None:
    assert score("math", response, answer) == 1.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{1} is wrong, so \boxed{2}", "1"),
        (r"\boxed{(0, 1)}", "[0, 1]"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2, 3\}"),
        (r"\boxed{7}", "-7"),
        (r"\boxed{(2, 1)}", "(1, 2)"),
        (r"\boxed{0.333}", r"\frac{1}{3}"),
        (r"\boxed{}", "0"),
        (r"\boxed{1.2}", "1,2"),
        (r"\boxed{\text{Tuesday}}", "Monday"),
        (r"\boxed{" + "(" * 3000, "3"),
        ("I do not know", "3"),
        ("", "3"),
        (r"<think>\boxed{3}", "3"),
        (r"\boxed{" * 500, "3"),
    ],
)
def test_math_wrong(response: str, answer: str) -> None:
    assert score("math", response, answer) == 0.0


def test_math_options_and_faults_of_the_data() -> None:
    assert score("math", "it is 3", "3") == 1.0
    assert score("math", "it is 3", "3", boxed=True) == 0.0
    assert score("math", r"\boxed{0.333}", r"\frac{1}{3}", digits=3) == 1.0
    with pytest.raises(ValueError, match="needs the row's answer"):
        score("math", r"\boxed{3}", " ")


@pytest.mark.parametrize(
    "response",
    [
        *(
            "B",
            "b",
            "(B)",
            "B.",
            "**B**",
            " B \n",
            r"\boxed{B}",
            r"\boxed{\text{(B)}}",
            "B) Paris",
            "(B) Paris",
        ),
        *("The answer is B.", "the answer is (b)", "**Answer:** B", "Answer: B\n", "Final answer - B"),
        *("The correct option is **B**, since A is wrong.", "I choose option B", "answer is: B", "Option B"),
        *("A is tempting.\nAnswer: A? No.\nThe answer is B", "Because of this:\n\nB"),
        *("<think>The answer is A</think><answer>B</answer>", "<answer> B. Paris </answer>"),
        "The correct answer is option B",
        r"\boxed{B. \text{Paris}}",
    ],
)
def test_single_choice_right(response: str) -> None:
    assert score("single_choice", response, "B") == 1.0
    assert score("single_choice", response, "A") == 0.0
    assert score("single_choice", response, "(B) Paris") == 1.0


@pytest.mark.parametrize(
    "response",
    [
        *("", "Bees are nice", "the answer is a matter of taste", "A) is wrong, B) may be right"),
        *("<think>The answer is B", "option A or option B", "The answer is not B", "AB"),
    ],
)
def test_single_choice_none(response: str) -> None:
    assert score("single_choice", response, "B") == score("single_choice", response, "A") == 0.0


def test_single_choice_options() -> None:
    fields = {"texts": ["London", "Paris"], "named": {"a": "London", "b": "Paris"}}
    for column in fields:
        assert score("single_choice", "Paris.", "B", fields, options=column) == 1.0
        assert score("single_choice", "London", "B", fields, options=column) == 0.0
    assert score("single_choice", "E", "E", choices="ABCDE") == 1.0
    with pytest.raises(ValueError, match="finds none of ABCDEFGH in the row's answer 'Paris'"):
        score("single_choice", "B", "Paris")
    began = time.monotonic()
    assert score("single_choice", "answer is" + " " * 200_000 + "*" * 20_000 + "\n" * 9, "B") == 0.0
    assert time.monotonic() - began < 5


def test_format_of_tags() -> None:
    good = "<think>\nwhy\n</think>\n<answer>4</answer>\n"
    assert score("format", good, style="think_answer") == 1.0
    bad = [
        "4",
        "well " + good,
        good + "more",
        good + good,
        good.replace("</think>", "</think> so"),
        "<answer>4</answer><think>why</think>",
        "<think></think><answer>4</answer>",
        "<think>why</think><answer> </answer>",
        "<think>why <answer>4</answer></think>",
        "<think>why</think>",
    ]
    assert [score("format", text, style="think_answer") for text in bad] == [0.0] * len(bad)
    assert score("format", "why</think><answer>4</answer>", style="think_answer", prefilled=True) == 1.0
    assert score("format", good, style="think_answer", prefilled=True) == 0.0
    assert score("format", "<think>why</think> 4", style="think") == 1.0
    assert score("format", "<think>why</think>", style="think") == 0.0


def test_overlong_is_dapos_soft_punishment() -> None:
    reward = make_reward(RewardSpec("overlong", "overlong", 1.0, {"buffer": 4, "penalty": 2.0}))
    values = [
        reward("p", "r", None, {}, SampleInfo(tokens, "stop", 16)) for tokens in (1, 12, 13, 14, 16, 20)
    ]
    assert values == [0.0, 0.0, -0.5, -1.0, -2.0, -2.0]
    with pytest.raises(ValueError, match="larger than the limit of 3 tokens"):
        reward("p", "r", None, {}, SampleInfo(1, "stop", 3))


def test_bad_options_name_the_fix() -> None:
    with pytest.raises(ValidationError, match="larger than max_tokens 8"):
        OverlongConfig(buffer=9, max_tokens=8)
    with pytest.raises(ValidationError, match="different capital letters"):
        SingleChoiceConfig(choices="AAB")
    with pytest.raises(ValidationError, match="remove `pattern`"):
        FormatConfig(style="think", pattern="x")
    with pytest.raises(ValidationError, match="prefilled is for"):
        FormatConfig(prefilled=True)
    with pytest.raises(ValidationError, match="module:function"):
        PythonConfig(function="my_reward.short")


def test_rows_without_what_a_reward_needs() -> None:
    def problem(reward: dict[str, object], answer: str | None, **fields: object) -> str | None:
        return row_checker([reward])(answer, fields)

    assert problem({"name": "math"}, "3") is None
    assert "reward 'math' needs the row's answer" in str(problem({"name": "math"}, None))
    assert "reward 'gsm8k' needs the row's answer" in str(problem({"name": "gsm8k"}, " "))
    assert problem({"name": "format"}, None) is None
    assert problem({"name": "contains", "text": "x"}, None) is None
    assert "needs `text`" in str(problem({"name": "contains"}, None))
    assert problem({"name": "code"}, "x", tests="assert f()") is None
    text = str(problem({"name": "code", "tests": "test"}, "x", tests="assert f()", level=1))
    assert (
        text
        == "reward 'code' needs the row's column 'test'; beside prompt and answer there are 'tests', 'level'"
    )
    assert "column 'entry'" in str(problem({"name": "code", "entry_point": "entry"}, "x", tests=""))
    assert "column 'opts'" in str(problem({"name": "single_choice", "options": "opts"}, "A"))
