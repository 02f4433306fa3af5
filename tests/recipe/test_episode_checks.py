"""What is said of a `simulator` section before anything is queued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rl.cli._episode_check import check_template
from hpc_rl.data.errors import DataError
from hpc_rl.recipe.load import load_recipe
from hpc_rl.recipe.yaml_source import RecipeError
from tests.data.chat_templates import QWEN3

RECIPE = """
name: tools
kind: rl
model: {path: some/model}
data: {train: {path: rows}}
algorithm: {name: grpo, group_size: 8}
reward: [{name: exact}]
simulator: {name: tools, tools: [calculator]}
policy: {steps: 1, batch_size: 8}
rollout: {max_tokens: 100}
"""


def load(tmp_path: Path, *overrides: str):  # type: ignore[no-untyped-def]
    (tmp_path / "r.yaml").write_text(RECIPE)
    return load_recipe(tmp_path / "r.yaml", list(overrides)).recipe


def test_defaults_are_written_and_load_again(tmp_path: Path) -> None:
    recipe = load(tmp_path, "simulator.tools=[calculator, {name: python, limit_s: 3}]")
    assert recipe.simulator is not None
    assert recipe.simulator["tools"] == [
        {"name": "calculator", "limit_s": 10.0},
        {"name": "python", "limit_s": 3.0, "memory_mb": 512, "output_kb": 256},
    ]
    assert (recipe.simulator["max_turns"], recipe.simulator["credit"]) == (5, "trajectory")
    again = load(tmp_path, f"simulator={json.dumps(recipe.simulator)}")
    assert again.simulator == recipe.simulator


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("simulator.tools=[calculater]", "Did you mean 'calculator'"),
        ("simulator.tools=[{name: python, limits: 3}]", "unknown key"),
        ("simulator.turns=3", "unknown key"),
        ("simulator.name=tool", "Did you mean 'tools'"),
        ("simulator.max_turn_tokens=101", "at most rollout.max_tokens 100"),
        ("reward=[]", "simulator tools gives no reward of its own"),
        ("data.train.chat=false", "tools are called in a conversation"),
        ("simulator.credit=turn", "no turn earns anything"),
        ("simulator.credit=step", "'trajectory' or 'turn'"),
    ],
)
def test_mistakes(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load(tmp_path, override)
    assert override.partition("=")[0].split(".")[0] in str(caught.value)


def test_rewards_of_turns(tmp_path: Path) -> None:
    turns = ["simulator.credit=turn", "simulator.call_reward=0.1"]
    assert load(tmp_path, "reward=[]", *turns).reward == []
    with pytest.raises(RecipeError, match="the policy makes the advantages"):
        load(tmp_path, *turns, "algorithm.kl_beta=0.1", "algorithm.kl_in=reward")


def test_templates_are_tried_before_the_queue(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    with pytest.raises(DataError, match=r"need a chat template, and .* has none"):
        check_template(recipe, tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    with pytest.raises(DataError, match="cannot show an observation behind a turn"):
        check_template(recipe, tmp_path)
    config.write_text(json.dumps({"chat_template": QWEN3}))
    check_template(recipe, tmp_path)
