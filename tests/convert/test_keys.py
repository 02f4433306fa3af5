"""Every key of the schema's SFT sections is dropped with a reason, or mapped, and then it does something."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.recipe.cosmos.keys import KEYS
from hpc_rl.recipe.messages import keys_at
from hpc_rl.recipe.old_names import RENAMED
from hpc_rl.recipe.schema import Recipe
from tests.convert.helpers import BASE, at, converted, entry, recipe_of
from tests.convert.schema_keys import LLAVA, ROWS


def test_the_table_has_the_schema_and_nothing_else() -> None:
    assert sorted(KEYS) == sorted(key for key, _, _ in ROWS)


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_mapped_to_keys_of_the_recipe_or_dropped_with_a_reason(key: str) -> None:
    row = KEYS[key]
    assert bool(row.to) != bool(row.why)
    for path in row.to:
        *above, name = path.split(".")
        assert name in keys_at(Recipe, tuple(above)), f"{key}: a recipe has no {path}"


def _companions(needs: dict[str, Any]) -> dict[str, Any]:
    """LLaVA files name their rows in `[custom]`, not in the dataset section."""
    return {**needs, "train.train_policy.dataset.name": None} if needs == LLAVA else needs


@cache
def _recipe_with(needs: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return recipe_of(converted(Path(folder), json.loads(needs)))


@pytest.mark.parametrize(("key", "value", "needs"), ROWS, ids=[row[0] for row in ROWS])
def test_each_key_has_one_fate_and_a_mapped_one_changes_the_recipe(
    tmp_path: Path, key: str, value: Any, needs: dict[str, Any]
) -> None:
    needs = _companions(needs)
    without = _recipe_with(json.dumps(needs))
    made = converted(tmp_path, {**needs, key: value})
    told = entry(made, key)
    assert [item.key for item in made.entries].count(key) == 1
    assert told.fate == ("mapped" if KEYS[key].to or value in KEYS[key].same else "dropped")
    if told.fate == "dropped":
        assert len(told.note) > 10
    elif KEYS[key].to and value != BASE.get(key):
        # What the key became is in the recipe, and it is not there (or other) without the key.
        assert set(told.to) <= set(KEYS[key].to) | {"cluster.policy.nodes"}
        recipe = recipe_of(made)
        changed = [path for path in told.to if at(recipe, path) != at(without, path)]
        same_as_ours = key in SAME_AS_OURS
        assert bool(changed) != same_as_ours, f"{key} -> {told.to} changed {changed}"


# Values that become what the recipe without them says: our default, or what the base of the test has.
SAME_AS_OURS = {
    "train.optm_name",  # Adam becomes AdamW, with a note
    "validation.val_before_train",
}


def test_all_keys_at_once_lose_none(tmp_path: Path) -> None:
    """A file that says everything: each key has exactly one line, and the recipe loads."""
    keys = {key: value for key, value, _ in ROWS}
    keys |= {"train.ckpt.upload_s3": "all", "policy.trainable_pattern": None, "policy.parallelism.tp_size": 1}
    keys |= {"train.train_policy.dataset.split": "train", "train.optm_lr": 1e-5}
    made = converted(tmp_path, keys)
    written = sorted(key for key, value in {**BASE, **keys}.items() if value is not None)
    assert sorted(item.key for item in made.entries) == written
    assert made.of("unknown") == []
    text = "\n".join(made.lines())
    for key in written:
        assert key in text
        # in the recipe's comments: whatever is not a mere renaming
        told = entry(made, key)
        if told.fate == "dropped":
            assert f"{key} = " in made.text


def test_what_a_file_does_not_say_and_we_would_do_otherwise_is_written_out(tmp_path: Path) -> None:
    """The least file: cosmos-rl's defaults that are not ours stand in the recipe, and are said."""
    made = converted(tmp_path, {key: None for key in BASE} | {
        "train.train_policy.type": "sft", "train.train_policy.dataset.name": "org/rows"
    })  # fmt: skip
    recipe = recipe_of(made)
    assert recipe["policy"] == {
        "parallel": {"tp": 2},
        "batch_size": 8,
        "micro_batch_tokens": 8192,
        "max_length": 4096,
        "epochs": 1,
        "optimizer": {"eps": 1e-6, "warmup_steps": 20},
        "activation_checkpointing": True,
    }
    assert recipe["model"] == {"path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    assert recipe["checkpoint"] == {"enabled": False, "export": "off"}
    assert recipe["logging"] == {"wandb": {"mode": "off"}}
    assert recipe["data"] == {"train": {"path": "org/rows", "format": "chat", "messages": "conversations"}}
    said = {item.key: item for item in made.assumed}
    assert "default is 2" in said["policy.parallelism.tp_size"].note
    assert "# " in made.text and "policy.parallelism.tp_size = 2 -> policy.parallel.tp" in made.text
    # what is our default too is neither written nor listed
    assert "train.optm_weight_decay" not in said
    assert "weight_decay" not in made.text


# These are names of a recipe too, or of a place in it that the error shows anyway.
SAME_NAMES = {
    "r", "seed", "revision", "split", "subset", "name", "path", "type", "enable", "target_modules", "fps",
    "use_rslora", "modules_to_save", "alpha_pattern", "r_pattern", "media_path", "max_frames", "min_pixels",
    "max_pixels", "warmup_steps", "upload_s3",
}  # fmt: skip
# Parts of what one section says here.
PARTS = {"do_profile", "active_steps", "wait_steps", "rank_filter", "profile_memory", "enable_profiler"}
PARTS |= {"enable_dp_load_balancing", "load_balanced_batches_per_optimizer_step"}


@pytest.mark.parametrize("name", sorted({key.rpartition(".")[2] for key, row in KEYS.items() if row.to}))
def test_a_mapped_name_in_a_recipe_is_an_error_that_gives_the_new_one(name: str) -> None:
    """Who types an old name into a recipe is told a key that `convert` would have written."""
    if name in SAME_NAMES | PARTS:
        assert name not in RENAMED
        return
    targets = {to for key, row in KEYS.items() if key.rpartition(".")[2] == name for to in row.to}
    assert any(to in RENAMED[name] or RENAMED[name].split(" ")[0] in to for to in targets)
