"""Which keys may change on resume; the table of docs/cli.md is the one in the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpc_rl.cli._prepare import create_run, prepare
from hpc_rl.cli._resume_keys import MAY_CHANGE, changes, flatten, may_change, refusals
from hpc_rl.cli._state import RunStatus
from hpc_rl.cli.errors import UserError
from hpc_rl.cli.resume import prepare_resume, refuse_finished
from hpc_rl.recipe.schema import Recipe
from tests.cli.helpers import make_recipe


@pytest.mark.parametrize(
    "key",
    [
        "cluster.time",
        "cluster.policy.nodes",
        "policy.steps",
        "policy.parallel.dp_shard",
        "rollout.replicas",
        "rollout.weights.timeout_s",
        "checkpoint.max_keep",
        "eval.every",
        "logging.wandb.mode",
    ],
)
def test_may_change(key: str) -> None:
    assert may_change(key)


@pytest.mark.parametrize(
    "key",
    [
        "seed",
        "name",
        "kind",
        "model.path",
        "model.dtype",
        "data.train.path",
        "policy.batch_size",
        "algorithm.clip_low",
        "algorithm.max_staleness",
        "reward",
        "policy.optimizer.lr",
        "rollout.max_tokens",
        "rollout.engine",
        "clusters",
    ],
)
def test_may_not_change(key: str) -> None:
    assert not may_change(key)


def test_every_rule_names_keys_of_the_schema() -> None:
    minimal = {
        "name": "x",
        "kind": "rl",
        "model": {"path": "m"},
        "data": {"train": {"path": "d"}},
        "rollout": {},
        "teacher": {"path": "t"},
    }
    flat = flatten(Recipe.model_validate(minimal).model_dump(mode="json"))
    for rule in MAY_CHANGE:
        stem = rule.removesuffix(".*")
        assert any(key == stem or key.startswith(stem + ".") for key in flat), rule


def test_changes_are_found_in_nested_settings_and_new_sections() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "reward": None, "d": {}}
    new = {"a": {"b": 2, "c": [1, 2]}, "reward": {"nodes": 1}, "d": {}}
    assert changes(old, new) == {"a.b": (1, 2), "reward": (None, None), "reward.nodes": (None, 1)} or changes(
        old, new
    ) == {"a.b": (1, 2), "reward.nodes": (None, 1)}


@pytest.mark.parametrize("batch_tokens", [None, 64])
def test_the_room_of_a_row_makes_the_steps_of_token_batches(batch_tokens: int | None) -> None:
    old, new = (
        {"seed": 1, "policy": {"batch_tokens": batch_tokens, "micro_batch_tokens": tokens, "steps": tokens}}
        for tokens in (32, 16)
    )
    assert refusals(old, old) == {}
    found = refusals(old, new)
    assert list(found) == (["policy.micro_batch_tokens"] if batch_tokens else [])
    assert list(refusals(old, {**new, "seed": 2}))[:1] == ["seed"]


def test_the_documented_table_is_the_one_in_the_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for key, why in MAY_CHANGE.items():
        assert f"| `{key}` | {why} |" in page, f"docs/cli.md lacks: | `{key}` | {why} |"


@pytest.mark.parametrize(
    ("before", "overrides", "said"),
    [
        ("policy.epochs=2", [], "policy.epochs=4"),
        ("policy.epochs=2", ["policy.epochs=2"], "policy.epochs=4"),
        ("policy.epochs=2", ["policy.epochs=1"], "policy.epochs=4"),
        ("policy.epochs=2", ["policy.epochs=3"], None),
        ("policy.epochs=2", ["policy.steps=5"], None),
        ("policy.epochs=2", ["policy.steps=4"], "policy.steps=8"),
        ("policy.steps=4", [], "policy.steps=8"),
        ("policy.steps=4", ["policy.steps=5"], None),
        ("policy.steps=4", ["policy.epochs=3"], None),
    ],
)
def test_a_completed_run_goes_on_where_it_is_given_more(
    tmp_path: Path, before: str, overrides: list[str], said: str | None
) -> None:
    """4 steps are done, by steps or by epochs; more of either is enough, and less is not."""
    first = prepare(make_recipe(tmp_path), [before])
    run, _ = create_run(first)
    status = RunStatus("tiny", str(run.root), None, "COMPLETED", 4, 4, 1, None)
    prepared, differences = prepare_resume(run, overrides)
    if said is None:
        refuse_finished(run, status, prepared, differences)
        return
    with pytest.raises(UserError, match=f"has completed its 4 steps.* {re.escape(said)}$"):
        refuse_finished(run, status, prepared, differences)
