"""Layers, overrides, exclusive keys, local paths, and that a resolved recipe reads back to an equal one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_rl.recipe import RecipeError, dump_resolved, load_recipe, read_resolved
from hpc_rl.recipe.share import share_dir

Write = Callable[..., Path]
Wrong = Callable[..., str]


def test_extends_merges_mappings_and_replaces_the_rest(write: Write) -> None:
    write("extends: small.yaml\npolicy: {steps: 7}\nreward: [{name: contains, weight: 2}]\n", "middle.yaml")
    recipe = load_recipe(write("extends: middle.yaml\nname: top\npolicy: {optimizer: {lr: 1e-4}}\n")).recipe
    assert (recipe.name, recipe.policy.steps, recipe.policy.batch_size) == ("top", 7, 8)
    assert recipe.policy.optimizer.lr == 1e-4
    assert [item["name"] for item in recipe.reward] == ["contains"]


def test_extends_is_relative_to_the_file_that_says_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("extends: ../small.yaml\n")
    assert load_recipe(write("extends: sub/a.yaml\n")).recipe.name == "small"


def test_cycles_are_an_error(write: Write, wrong: Wrong) -> None:
    write("extends: a.yaml\n", "b.yaml")
    text = wrong(write("extends: b.yaml\n", "a.yaml"))
    assert text.startswith("b.yaml:1: extends: goes round in a circle:")


def test_extends_of_nothing_names_line_and_shipped_recipes(write: Write, wrong: Wrong) -> None:
    text = wrong(write("name: x\nextends: nowhere\n"))
    assert text.startswith("r.yaml:2: extends: no recipe file")
    assert "gsm8k-grpo" in text


def test_overrides(write: Write) -> None:
    loaded = load_recipe(
        "small.yaml",
        [
            "reward.0.weight=2",
            "reward.1.name=contains",
            "cluster.variables.A=1",
            "policy.optimizer={lr: 1e-3}",
        ],
    )
    recipe = loaded.recipe
    assert recipe.reward[0] == {"name": "exact", "weight": 2, **_rest(recipe.reward[0])}
    assert recipe.reward[1]["name"] == "contains"
    assert recipe.cluster.variables == {"A": "1"}
    assert recipe.policy.optimizer.lr == 1e-3
    assert loaded.where("reward", 0, "weight") == "override 'reward.0.weight=2'"
    assert loaded.where("policy", "batch_size").endswith("small.yaml:8")


def _rest(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key not in ("name", "weight")}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.steps", "override 'policy.steps': must look like a.b=value, for example policy.steps=10"),
        ("=3", "override '=3': must look like a.b=value, for example policy.steps=10"),
        ("a..b=3", "override 'a..b=3': must look like a.b=value, for example policy.steps=10"),
        (
            "reward.x.weight=2",
            "override 'reward.x.weight=2': reward is a list; use a number, for example reward.0",
        ),
        (
            "reward.7.weight=2",
            "override 'reward.7.weight=2': reward has 1 entries; index 7 is beyond its end",
        ),
        (
            "extends=gsm8k-sft",
            "override 'extends=gsm8k-sft': must be written in the recipe file; it cannot be changed",
        ),
        ("policy.optimizer.lr=.inf", "override 'policy.optimizer.lr=.inf': policy.optimizer.lr: is Infinity"),
        ("seed=" + "9" * 5000, "override 'seed=999"),
        (
            "cluster.variables={HF_TOKEN: hf_value}",
            "override 'cluster.variables=(hidden)': cluster.variables.HF_TOKEN: looks like a secret",
        ),
        ("polcy={A_TOKEN: hf_value}", "override 'polcy=(hidden)': polcy: unknown key (value (hidden))"),
        (
            "policy.steps.x=3",
            "override 'policy.steps.x=3': policy.steps: is {\"x\": 3} (a mapping); must be an",
        ),
        ("reward.0.name.x=3", "override 'reward.0.name.x=3': reward.0.name: must be text"),
        ("reward.1.weight=2", "override 'reward.1.weight=2': reward.1.name: is required and missing"),
        (
            "policy.parallel.dp_shard=3",
            "override 'policy.parallel.dp_shard=3': policy.batch_size: is 8; must be divisible by the 3 data",
        ),
        ("algorithm.group_size=3", "override 'algorithm.group_size=3': policy.batch_size: is 8; must be"),
        ("cluster.time=3", "override 'cluster.time=3': cluster.signal_seconds: is 300; must be shorter"),
        ("seed=!!str 5", "override 'seed=!!str 5': YAML tags (!!str) are not read"),
        ("policy.steps=[1", "override 'policy.steps=[1': not valid YAML: '[1'"),
        (
            "policy.stepz=1",
            "override 'policy.stepz=1': policy.stepz: unknown key (value 1). Did you mean 'steps'?",
        ),
    ],
)
def test_bad_overrides(write: Write, wrong: Wrong, override: str, message: str) -> None:
    assert wrong("small.yaml", override).startswith(message)


def test_a_higher_layer_chooses_between_exclusive_keys(write: Write, wrong: Wrong) -> None:
    policy = load_recipe("small.yaml", ["policy.epochs=2"]).recipe.policy
    assert (policy.steps, policy.epochs) == (None, 2)
    policy = load_recipe("small.yaml", ["policy.micro_batch_size=2"]).recipe.policy
    assert (policy.micro_batch_size, policy.micro_batch_tokens) == (2, None)
    text = wrong(write("extends: small.yaml\npolicy: {steps: 1, epochs: 1}\n"))
    assert text == "r.yaml:2: policy.epochs: policy.steps and policy.epochs are both set; keep one"


def test_another_extension_drops_the_options_of_the_first(write: Write) -> None:
    write("extends: small.yaml\nrollout: {engine: hf, engine_options: {threads: 2}}\n", "base.yaml")
    recipe = load_recipe(write("extends: base.yaml\nrollout: {engine: vllm}\n")).recipe
    assert recipe.rollout is not None
    assert "threads" not in recipe.rollout.engine_options


def test_defaults_of_extensions_are_written(write: Write) -> None:
    recipe = load_recipe("small.yaml").recipe
    assert recipe.algorithm["clip_low"] == 0.2
    assert recipe.algorithm["group_size"] == 4
    assert recipe.reward[0]["weight"] == 1.0


def test_local_paths_are_relative_to_the_file_and_overrides_to_the_working_folder(
    write: Write, tmp_path: Path
) -> None:
    (tmp_path / "sub" / "model").mkdir(parents=True)
    (tmp_path / "sub" / "r.yaml").write_text("extends: ../small.yaml\nmodel: {path: model}\n")
    words = ["data.eval={path: ./held_out.jsonl, media_path: pictures}", "model.lora={adapter: ./adapter}"]
    loaded = load_recipe("sub/r.yaml", words)
    assert loaded.recipe.model.path == str(tmp_path / "sub" / "model")
    assert loaded.recipe.model.lora is not None
    assert loaded.recipe.model.lora.adapter == str(tmp_path / "adapter")
    assert loaded.recipe.data.train.path == str(tmp_path / "rows.jsonl")
    assert loaded.recipe.data.eval is not None
    assert loaded.recipe.data.eval.path == str(tmp_path / "held_out.jsonl")
    assert loaded.recipe.data.eval.media_path == str(tmp_path / "pictures")  # a folder, there or not
    assert load_recipe("small.yaml").recipe.model.path == "org/model"  # a name on the Hub


@pytest.mark.parametrize("value", ["a" * 5000, "./" + "a" * 300, "/no\x00where"])
def test_a_text_that_cannot_be_a_path_is_left_to_who_opens_it(write: Write, value: str) -> None:
    text = json.dumps(value)
    words = [f"model.path={text}", f"data.train.path={text}", f"data.train.media_path={text}"]
    assert load_recipe("small.yaml", words).recipe.data.train.media_path is not None


@pytest.mark.parametrize("file", sorted(share_dir("recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_load_and_read_back(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file).recipe
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_resolved(recipe))
    assert read_resolved(resolved) == recipe.model_copy(update={"extends": None})
    assert load_recipe(resolved).recipe == recipe.model_copy(update={"extends": None})
    assert load_recipe(file.stem).recipe == recipe


_overrides = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "model.revision": st.text("abcdef0123456789", min_size=1, max_size=40),
        "model.dtype": st.sampled_from(["float32", "bfloat16"]),
        "data.train.system": st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
        "data.train.limit": st.integers(1, 10**6),
        "policy.optimizer.lr": st.floats(0, 1),
        "policy.optimizer.betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
        "policy.micro_batch_size": st.integers(1, 64),
        "policy.epochs": st.integers(1, 9),
        "rollout.stop": st.lists(st.sampled_from(["\n", "off", "1e-6", "</s>", "'", "08:00:00"]), max_size=3),
        "checkpoint.max_keep": st.integers(-1, 10),
        "checkpoint.export": st.sampled_from(["off", "final", "all"]),
        "logging.wandb.mode": st.sampled_from(["online", "offline", "off"]),
        "cluster.variables": st.dictionaries(
            st.text("ABC_", min_size=1, max_size=5), st.text("a1e-6.:", max_size=8)
        ),
        "cluster.time": st.sampled_from(["30", "08:00:00", "1-00", "90:00"]),
        "algorithm.correction": st.just({"kind": "tis", "cap": 5}),
    },
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=_overrides)
def test_any_resolved_recipe_reads_back_equal(write: Write, tmp_path: Path, values: dict[str, Any]) -> None:
    import json

    recipe = load_recipe(
        "small.yaml", [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    ).recipe
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_resolved(recipe), encoding="utf-8")
    assert read_resolved(resolved) == recipe
    assert load_recipe(resolved).recipe == recipe


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from hpc_rl.recipe import load_recipe\n"
        "from hpc_rl.plan import make_plan\n"
        "from hpc_rl.cluster.sites import load_site\n"
        "make_plan(load_recipe('gsm8k-grpo'), load_site('generic-gpu'))\n"
        "heavy = ('torch', 'numpy', 'redis', 'jinja2', 'submitit', 'huggingface_hub')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=dict(os.environ),
    )
    assert done.stdout.strip() == "[]"


def test_the_home_of_an_unknown_user_is_no_traceback(write: Write, wrong: Wrong) -> None:
    load_recipe("small.yaml", ["data.train.path=~nobody-here/rows.jsonl"])  # `check` says it is not there
    assert "no recipe file" in wrong(write("extends: ~nobody-here/a.yaml\n"))
    assert "does not exist" in wrong("small.yaml", "plugins=[~nobody-here/a.py]")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit(0)\n", "plugins.0: plugin"),
        (
            "from hpc_rl.recipe.extensions import register\n"
            "register('rewards', 'lost-config', config='lost_plugin:C', implementation='lost_plugin:C')\n",
            "reward.0: rewards extension 'lost-config' cannot be used: module lost_plugin has no 'C'",
        ),
    ],
)
def test_a_plugin_that_leaves_or_has_no_config(write: Write, wrong: Wrong, code: str, message: str) -> None:
    write(code, "lost_plugin.py")
    assert message in wrong("small.yaml", "plugins=[lost_plugin.py]", "reward=[{name: lost-config}]")


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="no recipe file"):
        load_recipe("nowhere.yaml")
    assert issubclass(RecipeError, ValueError)
