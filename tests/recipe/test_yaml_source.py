"""YAML with line numbers: scalars, places, duplicates, syntax errors; what is dumped reads back."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.recipe.dump import dump_yaml
from hpc_rl.recipe.yaml_source import RecipeError, parse_value, parse_yaml


def parse(text: str) -> dict[str, Any]:
    return parse_yaml(text, "f.yaml", Path()).data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.0e-6", 1e-6),
        ("+.5", 0.5),
        ("off", "off"),
        ("on", "on"),
        ("yes", "yes"),
        ("No", "No"),
        ("true", True),
        ("False", False),
        ("08:00:00", "08:00:00"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("0o17", 15),
        ("0x1f", 31),
        ("017", 17),
        ("1_000", "1_000"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ('"off"', "off"),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("1.2.3", "1.2.3"),
        ("{a: [1, off]}", {"a": [1, "off"]}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert parse(f"k: {text}") == {"k": value}
    overridden, _ = parse_value(text)
    assert overridden == value
    assert type(overridden) is type(value)


def test_places_are_lines_of_the_file() -> None:
    source = parse_yaml("a: 1\nb:\n  - x\n  - c: 2\n    d: {e: 3}\n", "f.yaml", Path())
    lines = {path: place.line for path, place in source.places.items()}
    assert lines[("a",)] == 1
    assert lines[("b",)] == 2
    assert lines[("b", 0)] == 3
    assert lines[("b", 1, "c")] == 4
    assert lines[("b", 1, "d", "e")] == 5
    assert source.places[("a",)].raw == "1"
    missing = source.where(("b", 1, "zzz"))
    assert missing is not None
    assert str(missing) == "f.yaml:4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: duplicate key (first written in line 1); keep one of the two"),
        (
            "x:\n  y: 1\n  y: 1\n",
            "f.yaml:3: x.y: duplicate key (first written in line 2); keep one of the two",
        ),
        ("- 1\n", "f.yaml:1: must be a mapping of keys to values"),
        ("just text", "f.yaml:1: must be a mapping of keys to values"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "f.yaml:3: c: '<<' merges are not read; use 'extends'"),
        ("? [a]\n: 1\n", "f.yaml:1: a key must be text"),
        (
            "a: &x [*x]\n",
            "f.yaml:1: is nested deeper than 64 levels; look for aliases (*name) that repeat themselves",
        ),
        (
            "a: &a [1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in pairwise("abcdefgh")),
            "f.yaml:1: has more than 100000 values; look for aliases (*name) that repeat themselves",
        ),
        (
            "a:\n\tb: 1\n",
            "f.yaml:2: not valid YAML: found character that cannot start any token; "
            "indent with spaces, not tabs",
        ),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "place", "tag"),
    [
        ("a: 1\nb: !foo 3\n", "f.yaml:2: b", "!foo"),
        ("a: !!python/object/apply:os.system [ls]\n", "f.yaml:1: a", "!!python/object/apply:os.system"),
        ("a:\n  - !!str 5\n", "f.yaml:2: a.0", "!!str"),
        ("a: !!binary 'aGk='\n", "f.yaml:1: a", "!!binary"),
        ("a: !!set {x, y}\n", "f.yaml:1: a", "!!set"),
        ("!key a: 1\n", "f.yaml:1", "!key"),
    ],
)
def test_tags_are_refused(text: str, place: str, tag: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert str(caught.value).startswith(f"{place}: YAML tags ({tag}) are not read; remove it")


@pytest.mark.parametrize("text", ["a: [1\nb: 2", "a:\n\t- 1", "a: 'x", "a: b: c", "\x01"])
def test_syntax_errors_name_file_and_line(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text)
    assert str(caught.value).startswith("f.yaml")
    assert "not valid YAML" in str(caught.value)


_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_awkward = st.sampled_from(
    ["1e-6", "off", "08:00:00", "0o17", "null", "", "~", "1_0", "<<", "=", "a: b", "#x", ".5"]
)
_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _text | _awkward
_keys = st.text(st.characters(categories=["Ll", "Nd"], max_codepoint=127), min_size=1, max_size=6)
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(_keys, _values, max_size=4))
def test_what_is_dumped_reads_back(data: dict[str, Any]) -> None:
    assert parse(dump_yaml(data)) == data
