"""Configurations of GRPO and kin: every key of their sections has one fate; a mapped one does something."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.algorithms.config import GrpoConfig
from hpc_rl.recipe import load_recipe
from hpc_rl.recipe.cosmos import Conversion, convert_file
from hpc_rl.recipe.cosmos.keys import KEYS
from hpc_rl.recipe.cosmos.keys_rl import RL
from hpc_rl.recipe.messages import keys_at
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import RecipeError
from tests.convert.helpers import at, entry, recipe_of, toml
from tests.convert.schema_keys import LLAVA
from tests.convert.schema_rl import RL_BASE, RL_ROWS

TRAIN, ROLLOUT = "train.train_policy", "rollout"


def converted(tmp_path: Path, keys: Mapping[str, Any], **options: Any) -> Conversion:
    merged = {key: value for key, value in {**RL_BASE, **keys}.items() if value is not None}
    path = tmp_path / "config.toml"
    path.write_text(toml(merged), encoding="utf-8")
    return convert_file(path, **options)


def test_the_table_has_the_schema_and_nothing_else() -> None:
    assert sorted(RL) == sorted(key for key, _, _ in RL_ROWS)


@pytest.mark.parametrize("key", RL)
def test_a_key_is_mapped_to_keys_of_the_recipe_or_dropped_with_a_reason(key: str) -> None:
    row = RL[key]
    assert bool(row.to) != bool(row.why)
    for path in row.to:
        *above, name = path.split(".")
        if above[:1] == ["algorithm"] or above[:2] == ["rollout", "engine_options"]:
            continue  # an extension's own section
        assert name in keys_at(Recipe, tuple(above)), f"{key}: a recipe has no {path}"


@cache
def _recipe_with(needs: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return recipe_of(converted(Path(folder), json.loads(needs)))


# Values that become what the recipe without them says anyway.
SAME_AS_OURS = {
    "train.optm_name",  # Adam becomes AdamW, with a note
    f"{TRAIN}.use_rollout_logprobs_for_loss",  # always
    f"{TRAIN}.type",
    f"{TRAIN}.temperature",  # that of the sampling
}


# The other keys are SFT's too, and tested there.
OWN = [row for row in RL_ROWS if RL[row[0]] is not KEYS.get(row[0])]


@pytest.mark.parametrize(("key", "value", "needs"), OWN, ids=[row[0] for row in OWN])
def test_each_key_has_one_fate_and_a_mapped_one_changes_the_recipe(
    tmp_path: Path, key: str, value: Any, needs: dict[str, Any]
) -> None:
    needs = {} if needs == LLAVA else needs
    without = _recipe_with(json.dumps(needs))
    made = converted(tmp_path, {**needs, key: value})
    told = entry(made, key)
    assert [item.key for item in made.entries].count(key) == 1
    assert told.fate == ("mapped" if RL[key].to or value in RL[key].same else "dropped")
    if told.fate == "dropped":
        assert len(told.note) > 10
    elif RL[key].to and value != RL_BASE.get(key):
        assert set(told.to) <= set(RL[key].to) | {"cluster.policy.nodes"}
        changed = [path for path in told.to if at(recipe_of(made), path) != at(without, path)]
        assert bool(changed) != (key in SAME_AS_OURS), f"{key} -> {told.to} changed {changed}"


def test_all_keys_at_once_lose_none(tmp_path: Path) -> None:
    keys = {key: value for key, value, _ in RL_ROWS} | {key: RL_BASE[key] for key in RL_BASE}
    keys |= {"train.ckpt.upload_s3": "all", "policy.trainable_pattern": None, "train.optm_lr": 1e-5}
    keys |= {f"{TRAIN}.dataset.split": "train", f"{TRAIN}.variant": "dapo", f"{TRAIN}.aipo_rho": None}
    keys |= {f"{TRAIN}.use_rollout_logprobs_for_loss": False, "policy.lora.lora_dropout": 0.0}
    made = converted(tmp_path, keys)
    written = sorted(key for key, value in {**RL_BASE, **keys}.items() if value is not None)
    assert sorted(item.key for item in made.entries) == written
    assert made.of("unknown") == []


def test_a_plain_file_says_which_defaults_are_cosmos_rls(tmp_path: Path) -> None:
    """The published phi-4 configuration's shape, with nothing but names and sizes."""
    made = converted(tmp_path, {})
    recipe = recipe_of(made)
    assert recipe["kind"] == "rl"
    assert recipe["algorithm"] == {
        "name": "grpo", "group_size": 16, "temperature": 1.0, "clip_low": 0.2, "clip_high": 0.2,
        "dual_clip": 3.0, "loss_aggregation": "token_mean", "normalize_std": True, "kl_beta": 0.0,
        "proximal": "sampler", "max_staleness": 4,
    }  # fmt: skip
    assert recipe["reward"] == [{"name": "single_choice"}]
    assert recipe["policy"]["batch_size"] == 32
    assert recipe["policy"]["micro_batch_tokens"] == 2 * 4096
    assert recipe["rollout"]["max_tokens"] == 2048
    assert recipe["rollout"]["max_model_len"] == 4096
    assert recipe["data"]["train"] == {"path": "org/rows", "prompt": "question"}
    assert any("ratio 1 on samples up to allowed_outdated_steps old" in note for note in made.notes)
    said = {item.key: item.to for item in made.assumed}
    assert said[f"{TRAIN}.reward_function"] == "reward"
    assert said[f"{TRAIN}.allowed_outdated_steps"] == "algorithm.max_staleness"


def algorithm(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    """The algorithm as the recipe loads it, every default written out."""
    made = converted(tmp_path, {f"{TRAIN}.{key}": value for key, value in keys.items()})
    path = tmp_path / "made.yaml"
    path.write_text(made.text)
    return load_recipe(path).recipe.algorithm


def test_variants(tmp_path: Path) -> None:
    dapo = algorithm(tmp_path, variant="dapo", epsilon_high=0.28, filter_reward_metric=["acc"])
    assert (dapo["name"], dapo["clip_high"], dapo["drop_zero_variance"]) == ("dapo", 0.28, True)
    assert dapo["overlong_buffer"] == 0, "cosmos-rl's is a reward of its own"
    gspo = algorithm(tmp_path, variant="gspo", epsilon_low=3e-4, epsilon_high=4e-4)
    assert (gspo["name"], gspo["clip_low"], gspo["loss_aggregation"]) == ("gspo", 3e-4, "sequence_mean")
    aipo = algorithm(tmp_path, aipo_rho=4.0)
    assert (aipo["name"], aipo["is_cap"], aipo["proximal"]) == ("aipo", 4.0, "sampler")
    decoupled = algorithm(tmp_path, use_decoupled_loss=True, behav_imp_weight_cap=5.0)
    correction = decoupled["correction"]
    assert decoupled["proximal"] == "recompute"
    assert (correction["kind"], correction["low"], correction["high"]) == ("icepop", 0.0, 5.0)
    drgrpo = algorithm(
        tmp_path, unbiased_advantage=True, loss_type="seq-mean-token-mean", unbiased_loss_max_tokens=2048
    )
    assert (drgrpo["normalize_std"], drgrpo["loss_aggregation"]) == (False, "constant_length")
    assert drgrpo["loss_length"] == 2048
    assert algorithm(tmp_path, on_policy=True)["max_staleness"] == 0
    kl = algorithm(tmp_path, kl_beta=0.01, unbiased_kl_estimate=True)
    assert (kl["kl_beta"], kl["kl_estimator"]) == (0.01, "k3_k2")
    one_sided = algorithm(tmp_path, epsilon_low=-1.0)
    assert (one_sided["clip_low"], one_sided["clip_high"]) == (0.99, 0.2)


def test_the_dual_clip_is_theirs_and_not_our_default(tmp_path: Path) -> None:
    made = algorithm(tmp_path)
    assert GrpoConfig(**{k: v for k, v in made.items() if k != "name"}).floor == 3.0
    assert GrpoConfig().floor == 2.0


def test_rewards_by_name_list_and_weight(tmp_path: Path) -> None:
    def rewards(value: Any, **more: Any) -> list[dict[str, Any]]:
        return recipe_of(converted(tmp_path, {f"{TRAIN}.reward_function": value, **more}))["reward"]

    assert rewards("gsm8k") == [{"name": "gsm8k"}]
    assert rewards(["boxed_math", "format"]) == [
        {"name": "math", "boxed": True}, {"name": "format", "style": "think_answer"},
    ]  # fmt: skip
    long = {f"{TRAIN}.overlong_reward.enable_overlong_penalty": True, "rollout.max_response_length": 8192}
    long |= {"policy.model_max_length": 10240}
    assert rewards({"direct_math": 2.0, "overlong": 1.0}, **long) == [
        {"name": "math", "weight": 2.0}, {"name": "overlong", "buffer": 4096},
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r'"mine" is none of cosmos-rl\'s rewards .*name yours on the'):
        rewards("mine")
    made = converted(tmp_path, {f"{TRAIN}.reward_function": "mine"}, overrides=["reward=[{name: exact}]"])
    assert recipe_of(made)["reward"] == [{"name": "exact"}]
    assert entry(made, f"{TRAIN}.reward_function").fate == "dropped"


def test_scripts_of_cosmos_rl_bring_columns_and_rewards(tmp_path: Path) -> None:
    keys = {f"{TRAIN}.prompt_column_name": None, f"{TRAIN}.response_column_name": None}
    made = recipe_of(converted(tmp_path, keys, script="tools/dataset/gsm8k_grpo.py"))
    assert made["data"]["train"]["prompt"] == "question"
    assert made["reward"] == [{"name": "gsm8k"}]
    made = recipe_of(converted(tmp_path, {**keys, "rollout.n_generation": 8}, script="cosmos_grpo.py"))
    assert made["data"]["train"]["format"] == "cosmos_reason1"
    assert made["data"]["train"]["max_pixels"] == 81920
    assert made["reward"] == [{"name": "single_choice"}, {"name": "format", "style": "think_answer"}]


def test_validation_needs_rows_of_its_own(tmp_path: Path) -> None:
    made = converted(tmp_path, {"validation.enable": True, "validation.freq": 5})
    assert "eval" not in recipe_of(made)["data"]
    assert any("RL evaluates rows of their own: data.eval; name them" in note for note in made.notes)
    keys = {"validation.enable": True, "validation.dataset.name": "org/held-out", "validation.freq": 5}
    keys |= {"validation.temperature": 0.6, "validation.n_generation": 8}
    recipe = recipe_of(converted(tmp_path, keys))
    assert recipe["eval"] == {"every": 5, "before": False, "samples": 8, "temperature": 0.6}
    assert recipe["data"]["eval"] == {"path": "org/held-out", "prompt": "question"}
    greedy = converted(tmp_path, {**keys, "validation.temperature": 0.0})
    assert "all answers to a prompt are alike" in entry(greedy, "validation.n_generation").note


def test_replicas_are_spread_over_nodes(tmp_path: Path) -> None:
    keys = {f"{ROLLOUT}.parallelism.n_init_replicas": 6, f"{ROLLOUT}.parallelism.tp_size": 4}
    recipe = recipe_of(converted(tmp_path, keys))
    assert recipe["rollout"]["replicas"] == 6
    assert recipe["cluster"]["rollout"] == {"nodes": 3}
    made = converted(tmp_path, {"policy.parallelism.n_init_replicas": 2})
    assert recipe_of(made)["policy"]["batch_size"] == 64, "32 answers on each of two replicas"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({f"{TRAIN}.variant": "ppo"}, 'variant: is "ppo"; allowed: grpo, dapo, gspo'),
        ({f"{TRAIN}.loss_type": "token-sum"}, r'loss_type: is "token-sum"; allowed: token-mean'),
        ({f"{ROLLOUT}.backend": "vla"}, r'rollout.backend: is "vla"; allowed: vllm'),
        ({f"{TRAIN}.batch_size_per_optimize": 5}, "batch_size_per_optimize: is 5; must divide"),
        ({f"{ROLLOUT}.n_generation": 5}, r"n_generation.*|train_batch_per_replica.*divisible by"),
        ({f"{TRAIN}.reward_function": 3}, "reward_function: must be a name, a list of names, or a table"),
        ({f"{TRAIN}.trainer_type": "grpo_vla"}, "trainer_type: is 'grpo_vla'; only the trainer 'grpo' is"),
        ({f"{TRAIN}.dataset.name": None}, r"dataset.name: is empty, so a script of your own made the rows"),
    ],
)
def test_mistakes_name_the_key_of_the_file(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        converted(tmp_path, keys)


def test_keys_of_other_trainers(tmp_path: Path) -> None:
    keys = {f"{TRAIN}.conversation_column_name": "messages", "distillation.enable": False}
    made = converted(tmp_path, {**keys, "vla.num_envs": 8, f"{TRAIN}.epsilon_hihg": 0.3})
    assert entry(made, f"{TRAIN}.conversation_column_name").note == "type grpo did not read it"
    assert "teacher" in entry(made, "distillation.enable").note
    assert entry(made, f"{TRAIN}.epsilon_hihg").note == f"did you mean {TRAIN}.epsilon_high?"
    # cosmos-rl's default is GRPO, so a file without the type is one of RL
    made = converted(tmp_path, {f"{TRAIN}.type": None})
    assert recipe_of(made)["kind"] == "rl"
    assert any('default is "grpo"' in note for note in made.notes)
