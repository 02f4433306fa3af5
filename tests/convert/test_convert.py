"""What configurations become: LLMs, LLaVA rows, Cosmos-Reason1, LoRA; typos; values of another meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc_rl.catalog.trainers import unsupported_dimensions
from hpc_rl.recipe import RecipeError, load_recipe
from hpc_rl.recipe.cosmos import convert_file
from tests.convert.helpers import at, converted, entry, recipe_of


def test_a_language_model(tmp_path: Path) -> None:
    """SFT on four GPUs with checkpoints and W&B; the script repairs the roles."""
    keys = {
        "policy.model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.3",
        "policy.model_max_length": 1024,
        "train.train_policy.dataset.name": "org/chats",
        "train.train_policy.dataset.split": "train",
        "train.train_policy.conversation_column_name": "conversation",
        "train.train_batch_per_replica": 8,
        "train.compile": False,
        "train.output_dir": "./outputs/mistral-sft",
        "train.ckpt.enable_checkpoint": True,
        "train.ckpt.save_freq": 100,
        "logging.logger": ["console", "wandb"],
        "logging.project_name": "cosmos_rl",
        "logging.experiment_name": "None",
    }
    made = converted(tmp_path, keys, script="./tools/dataset/dummy_sft.py")
    recipe = recipe_of(made)
    assert recipe == {
        "name": "mistral-sft",
        "kind": "sft",
        "output_root": "./outputs",
        "model": {"path": "mistralai/Mistral-7B-Instruct-v0.3"},
        "data": {
            "train": {
                "path": "org/chats",
                "format": "chat",
                "messages": "conversation",
                "repair": ["merge_roles", "move_system"],
            }
        },
        "policy": {
            "parallel": {"dp_shard": 4},
            "batch_size": 32,
            "micro_batch_tokens": 2048,
            "max_length": 1024,
            "epochs": 1,
            "optimizer": {"eps": 1e-6, "warmup_steps": 20},
            "activation_checkpointing": True,
        },
        "checkpoint": {"save_every": 100, "max_keep": 5, "export": "all"},
        "logging": {"wandb": {"mode": "online", "project": "cosmos_rl"}},
        "cluster": {"secrets": ["WANDB_API_KEY"]},
    }
    assert "8 on each of 4 data-parallel ranks" in entry(made, "train.train_batch_per_replica").note
    assert any("glued the turns" in note for note in made.notes)


def test_llava_rows(tmp_path: Path) -> None:
    keys = {
        "train.train_policy.dataset.name": None,
        "policy.model_name_or_path": "nvidia/Cosmos-Reason2-8B",
        "custom.dataset.annotation_path": "/data/annotations.json",
        "custom.dataset.media_path": "/data/train2017",
        "custom.dataset.system_prompt": "You are a helpful assistant.",
        "custom.vision.max_pixels": 262144,
        "custom.vision.fps": 1,
        "custom.mine.whatever": 3,
    }
    for script in ("scripts/llava_sft.py", None):
        made = converted(tmp_path, keys, script=script)
        assert recipe_of(made)["data"]["train"] == {
            "path": "/data/annotations.json",
            "format": "llava",
            "system": "You are a helpful assistant.",
            "media_path": "/data/train2017",
            "max_pixels": 262144,
            "fps": 1,
        }
        told = entry(made, "custom.mine.whatever")
        assert (told.fate, "script of your own" in told.note) == ("unknown", True)
    # rows with whole paths; the script's frame rate without [custom.vision]
    keys = {"train.train_policy.dataset.name": None, "custom.dataset.annotation_path": "/data/a.json"}
    train = recipe_of(converted(tmp_path, {**keys, "custom.dataset.media_path": ""}))["data"]["train"]
    assert train == {"path": "/data/a.json", "format": "llava", "fps": 1.0}


def test_cosmos_reason1(tmp_path: Path) -> None:
    keys = {
        "policy.model_name_or_path": "nvidia/Cosmos-Reason1-7B",
        "train.train_policy.dataset.name": "nvidia/Cosmos-Reason1-SFT-Dataset",
        "train.train_policy.dataset.subset": "robovqa",
        "train.train_policy.dataset.split": "understanding",
        "train.train_policy.dataset.test_size": 100,
        "train.train_policy.mini_batch": 4,
        "policy.parallelism.dp_shard_size": 2,
        "policy.parallelism.cp_rotate_method": "allgather",
        # names of an older version
        "train.enable_validation": True,
        "train.validation_step": 30,
    }
    made = converted(tmp_path, keys)
    assert recipe_of(made)["data"] == {
        "train": {
            "path": "nvidia/Cosmos-Reason1-SFT-Dataset",
            "subset": "robovqa",
            "split": "understanding",
            "format": "cosmos_reason1",
            "media_path": "~/.cache/cosmos/datasets/nvidia/Cosmos-Reason1-SFT-Dataset/robovqa/video_clips",
            "max_pixels": 81920,
            "fps": 1.0,
        },
        "holdout": 100,
    }
    assert recipe_of(made)["eval"] == {"every": 30, "before": False}
    assert "read as validation.enable" in entry(made, "train.enable_validation").note
    assert entry(made, "policy.parallelism.cp_rotate_method").fate == "unknown"


def test_lora(tmp_path: Path) -> None:
    keys = {
        "policy.lora.r": 8,
        "policy.lora.lora_alpha": 16.0,
        "policy.lora.target_modules": "all-linear",
        "policy.lora.lora_names": ["default"],
        "policy.lora.init_lora_weights": True,
    }
    made = converted(tmp_path, keys)
    assert recipe_of(made)["model"]["lora"] == {"r": 8, "alpha": 16.0, "export": "adapter"}
    assert made.of("dropped") == []
    # the other weights are frozen anyway
    made = converted(tmp_path, {**keys, "policy.trainable_map": {"model.visual": False}})
    assert "exclude_modules" in entry(made, "policy.trainable_map").note
    assert "freeze" not in recipe_of(made)["model"]
    # an empty section is the default adapter of cosmos-rl, whose sizes are not ours
    only_dropout = recipe_of(converted(tmp_path, {"policy.lora.lora_dropout": 0.1}))["model"]["lora"]
    assert only_dropout == {"r": 8, "alpha": 8.0, "dropout": 0.1, "export": "adapter"}


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("policy.model_gradient_checkpointig", "policy.model_gradient_checkpointing"),
        ("train.opmt_lr", "train.optm_lr"),
        ("train.ckpt.save_frequency", "train.ckpt.save_freq"),
        ("policy.parallelism.dp_shard", "policy.parallelism.dp_shard_size"),
        ("train.model_max_length", "policy.model_max_length"),
        ("policy.lora.alpha", "policy.lora.lora_alpha"),
    ],
)
def test_a_mistyped_key_is_named_with_the_one_that_was_meant(tmp_path: Path, key: str, near: str) -> None:
    made = converted(tmp_path, {key: 5})
    told = entry(made, key)
    assert (told.fate, told.note) == ("unknown", f"did you mean {near}?")
    assert told.where == f"{tmp_path / 'config.toml'}:6"
    assert f"{key} = 5 ({told.where}): did you mean {near}?" in "\n".join(made.lines())
    bare = converted(tmp_path, {}).recipe
    assert made.recipe == bare  # ignored there, so ignored here


MEANINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # learning rates
    ({"train.optm_lr": [1e-5, 1e-5]}, {"lr": 1e-5}),
    ({"train.optm_lr": [1e-5, 2e-5, 3e-6]}, {
        "lr": 1e-5,
        "groups": [
            {"match": r"(^|\.)(multi_modal_projector|merger|mlp1|connector)\.", "lr": 2e-5},
            {"match": r"(^|\.)(visual|vision_tower|vision_model)\.", "lr": 3e-6},
        ],
    }),
    ({"train.optm_lr": {"global": 1e-5, "model.visual": 1e-6, "model.visual.merger": 1e-4}}, {
        "lr": 1e-5,
        "groups": [
            {"match": r"(^|\.)model\.visual\.merger\.", "lr": 1e-4},
            {"match": r"(^|\.)model\.visual\.", "lr": 1e-6},
        ],
    }),
    # warm-up: steps, or a share
    ({"train.optm_warmup_steps": 0}, {}),
    ({"train.optm_warmup_steps": 50}, {"warmup_steps": 50}),
    ({"train.optm_warmup_steps": 0.03}, {"warmup_ratio": 0.03}),
    ({"train.optm_warmup_steps": 12.0}, {"warmup_steps": 12}),
    # decay
    ({"train.optm_decay_type": "none"}, {"warmup_steps": 20}),
    ({"train.optm_decay_type": "cosine"}, {"schedule": "cosine", "warmup_steps": 20}),
    ({"train.optm_decay_type": "linear", "train.optm_min_lr_factor": 0.1, "train.optm_lr": 1e-4},
     {"lr": 1e-4, "schedule": "linear", "warmup_steps": 20, "min_lr": 1e-5}),
    ({"train.optm_decay_type": "sqrt"}, {"schedule": "linear", "warmup_steps": 20}),
    ({"train.optm_decay_type": "linear", "train.optm_decay_ratio": 0.1}, {"schedule": "wsd"}),
    ({"train.optm_decay_type": "linear", "train.optm_decay_ratio": 0.2, "train.max_num_steps": 500},
     {"schedule": "wsd", "warmup_steps": 20, "decay_steps": 100}),
    ({"train.optm_decay_type": "cosine", "train.optm_decay_ratio": 0}, {"warmup_steps": 20}),
    # the rest
    ({"train.optm_grad_norm_clip": 0}, {"warmup_steps": 20, "clip_norm": None}),
    ({"train.optm_betas": [0.9, 0.95]}, {"betas": [0.9, 0.95], "warmup_steps": 20}),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "expected"), MEANINGS, ids=[str(keys) for keys, _ in MEANINGS])
def test_the_optimizer(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    optimizer = recipe_of(converted(tmp_path, keys))["policy"]["optimizer"]
    expected = {"eps": 1e-6, **expected}
    expected.setdefault("warmup_steps", 20) if "train.optm_warmup_steps" not in keys else None
    assert optimizer == {key: pytest.approx(v) if isinstance(v, float) else v for key, v in expected.items()}


MESHES: list[tuple[dict[str, int], int | None, dict[str, int], int, int]] = [
    ({"tp_size": 1, "dp_shard_size": 4}, None, {"dp_shard": 4}, 32, 1),
    ({"tp_size": None, "dp_shard_size": 4}, None, {"dp_shard": 4, "tp": 2}, 32, 1),
    ({"tp_size": 2, "dp_shard_size": -1}, None, {"dp_shard": 4, "tp": 2}, 32, 1),
    ({"tp_size": 1, "dp_shard_size": -1}, 4, {"dp_shard": 4}, 32, 1),
    (
        {"tp_size": 1, "dp_shard_size": 8, "dp_replicate_size": 2},
        None,
        {"dp_replicate": 2, "dp_shard": 8},
        128,
        2,
    ),
    (
        {"tp_size": 1, "dp_shard_size": 4, "n_init_replicas": 3},
        None,
        {"dp_replicate": 3, "dp_shard": 4},
        96,
        2,
    ),
    (
        {"tp_size": 1, "dp_shard_size": 4, "pp_size": 2, "cp_size": 2},
        None,
        {"dp_shard": 4, "pp": 2, "cp": 2},
        32,
        2,
    ),
]


@pytest.mark.parametrize(("sizes", "gpus", "parallel", "batch", "nodes"), MESHES)
def test_the_mesh_and_the_batch_over_all_ranks(
    tmp_path: Path, sizes: dict[str, int], gpus: int | None, parallel: dict[str, int], batch: int, nodes: int
) -> None:
    made = converted(
        tmp_path, {f"policy.parallelism.{name}": size for name, size in sizes.items()}, gpus=gpus
    )
    recipe = recipe_of(made)
    assert recipe["policy"]["parallel"] == parallel
    assert recipe["policy"]["batch_size"] == batch
    assert at(recipe, "cluster.policy.nodes") == (nodes if nodes > 1 else None)
    refused = unsupported_dimensions("fsdp2", parallel)
    assert len([note for note in made.notes if "cannot shard by it" in note]) == len(refused)


def test_dp_shard_of_minus_one_must_come_out_even(tmp_path: Path) -> None:
    keys = {"policy.parallelism.tp_size": 3, "policy.parallelism.dp_shard_size": -1}
    with pytest.raises(
        RecipeError, match=r"config.toml:5: policy.parallelism.dp_shard_size: is -1 .* 3 ranks"
    ):
        converted(tmp_path, keys)


def test_float16_becomes_bfloat16(tmp_path: Path) -> None:
    """`float16` has no loss scaling here, and a recipe refuses it."""
    found = converted(tmp_path, {"train.param_dtype": "float16", "train.max_num_steps": 50})
    assert "dtype" not in recipe_of(found)["model"]  # bfloat16 is the default


def test_load_balanced_batches_are_counted_in_tokens(tmp_path: Path) -> None:
    place = "train.train_policy"
    keys = {f"{place}.enable_dp_load_balancing": True, f"{place}.load_balanced_batches_per_optimizer_step": 3}
    keys |= {f"{place}.load_balanced_max_tokens_for_batch": 9000, "train.max_num_steps": 50}
    policy = recipe_of(converted(tmp_path, keys))["policy"]
    assert (policy["micro_batch_tokens"], policy["batch_tokens"]) == (9000, 9000 * 3 * 4)
    assert policy["steps"] == 50


FROZEN = [
    (
        {"model.visual": False},
        [r"(^|\.)model\.visual(\.|$)"],
        ["model.visual.blocks.0.w"],
        ["model.visual2.w"],
    ),
    (
        {"model": False, "model.head": True},
        [r"(^|\.)model\.(?!head(\.|$))"],
        ["model.layers.0.w"],
        ["model.head.w"],
    ),
    ({"lm_head.weight": False}, [r"(^|\.)lm_head\.weight(\.|$)"], ["lm_head.weight"], ["lm_head.weights"]),
]


@pytest.mark.parametrize(("flags", "patterns", "frozen", "trained"), FROZEN)
def test_a_map_of_trained_modules_becomes_patterns(
    tmp_path: Path, flags: dict[str, bool], patterns: list[str], frozen: list[str], trained: list[str]
) -> None:
    import re

    model = recipe_of(converted(tmp_path, {"policy.trainable_map": flags}))["model"]
    assert model["freeze"] == patterns
    assert all(any(re.search(p, name) for p in patterns) for name in frozen)
    assert not any(re.search(p, name) for p in patterns for name in trained)


def test_everything_trained_freezes_nothing(tmp_path: Path) -> None:
    made = converted(tmp_path, {"policy.trainable_map": {"model.visual": True}})
    assert "freeze" not in recipe_of(made)["model"]
    assert entry(made, "policy.trainable_map").fate == "mapped"


def test_uploads_and_their_secrets(tmp_path: Path) -> None:
    place = "train.ckpt"
    keys = {f"{place}.enable_checkpoint": True, f"{place}.upload_hf": True, f"{place}.hf_repo_name": "Mine"}
    keys |= {f"{place}.upload_s3": True, f"{place}.s3_bucket": "a-bucket", "logging.logger": ["wandb"]}
    made = converted(tmp_path, keys)
    recipe = recipe_of(made)
    assert recipe["checkpoint"]["upload_hub"] == {"repo": "Mine"}
    assert recipe["checkpoint"]["upload_s3"] == {"bucket": "a-bucket", "prefix": "outputs"}
    assert "no value of cosmos-rl's own" in entry(made, f"{place}.upload_s3").note
    aws = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"]
    assert any(
        "AWS_ENDPOINT_URL" in note for note in made.notes
    )  # optional, and a name in the list must be set
    assert recipe["cluster"]["secrets"] == ["HF_TOKEN", *aws, "WANDB_API_KEY"]
    with pytest.raises(RecipeError, match="upload_s3: is true, and s3_bucket is missing"):
        converted(tmp_path, {**keys, f"{place}.s3_bucket": None})


def test_resume_is_a_command_here(tmp_path: Path) -> None:
    assert "hpc-rl resume RUN" in entry(converted(tmp_path, {"train.resume": True}), "train.resume").note
    told = entry(converted(tmp_path, {"train.resume": "outputs/step_100"}), "train.resume")
    assert (told.fate, "safetensors/step_N" in told.note) == ("dropped", True)
    assert entry(converted(tmp_path, {"train.resume": False}), "train.resume").fate == "mapped"


NAMES = [
    ({}, "config", None),
    ({"train.output_dir": "./outputs/one"}, "one", "./outputs"),
    ({"train.output_dir": "outputs"}, "config", "outputs"),
    ({"train.output_dir": "/scratch/me/"}, "me", "/scratch"),
    ({"logging.experiment_name": "a/b c", "train.output_dir": "./outputs/one"}, "a-b-c", "./outputs/one"),
    ({"logging.experiment_name": "$$$"}, "config", None),
]


@pytest.mark.parametrize(("keys", "name", "root"), NAMES)
def test_names_and_folders(tmp_path: Path, keys: dict[str, Any], name: str, root: str | None) -> None:
    recipe = recipe_of(converted(tmp_path, keys))
    assert (recipe["name"], recipe.get("output_root")) == (name, root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[model]\na = 1\n[trainer]\nmax_iter = 3\n[job]\nname = 'x'\n",
            r"job, model, trainer: is a .*world models",
        ),
        ("[policy]\nis_diffusers = true\n", r":2: policy.is_diffusers: is true: models of diffusers"),
        ('[train.train_policy]\ntype = "sft"\ntrainer_type = "pi_sft"\n', r":3: .*trainer_type: is 'pi_sft'"),
        (
            '[train.train_policy]\ntype = "dpo"\n',
            r':2: train.train_policy.type: is "dpo"; allowed: sft, grpo',
        ),
    ],
)
def test_files_that_another_converter_will_read(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        convert_file(path)


def test_the_recipe_finds_what_lies_beside_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cosmos-rl's paths are relative to where it was started, a recipe's to the recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "made.yaml"
    made = converted(tmp_path, {"train.train_policy.dataset.name": "rows"}, folder=path.parent)
    path.write_text(made.text)
    assert load_recipe(path).recipe.data.train.path == str(tmp_path / "rows")
    assert "org/base" in made.text  # a name on the Hub stays


def test_keys_of_the_recipe_can_be_set_on_the_way(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with pytest.raises(RecipeError, match=r"dataset.name: is empty, so a script of your own made the rows"):
        converted(tmp_path, {"train.train_policy.dataset.name": None}, script="mine.py")
    made = converted(
        tmp_path,
        {"train.train_policy.dataset.name": None},
        script="mine.py",
        overrides=[f"data.train.path={rows}", "policy.epochs=3"],
    )
    assert at(recipe_of(made), "data.train.path") == str(rows)
    assert at(recipe_of(made), "policy.epochs") == 3
    assert "# override: policy.epochs=3" in made.text
    assert any("mine.py is not one of cosmos-rl's own" in note for note in made.notes)


def test_a_prompt_that_is_there_is_not_called_empty(tmp_path: Path) -> None:
    made = converted(tmp_path, {"train.train_policy.system_prompt": "Be kind."})
    said = entry(made, "train.train_policy.system_prompt")
    assert (said.to, said.note) == (["data.train.system"], "")
    made = converted(tmp_path, {"train.train_policy.system_prompt": ""})
    assert entry(made, "train.train_policy.system_prompt").note == "empty"


def test_two_rates_are_those_of_the_language_model_and_the_vision_tower(tmp_path: Path) -> None:
    note = entry(converted(tmp_path, {"train.optm_lr": [1e-4, 2e-5]}), "train.optm_lr").note
    assert note.endswith("parts: language model, vision tower")
    note = entry(converted(tmp_path, {"train.optm_lr": [1e-4, 2e-5, 3e-5]}), "train.optm_lr").note
    assert note.endswith("parts: language model, projector, vision tower")
