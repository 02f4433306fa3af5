"""A tiny model and data set on disk, and recipes on them: what the end-to-end tests run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz =:#\n"


def make_model(folder: Path, seed: int = 0) -> Path:
    """A Qwen2 of two layers with random weights in fp32, and a character-level tokenizer."""
    from tests.tiny_models import character_tokenizer, save_model

    special = ("<pad>", "<bos>", "<eos>", "<unk>")
    shape = {"vocab_size": len(special) + len(CHARACTERS), "num_key_value_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    save_model(folder, "qwen2", seed, max_position_embeddings=128, **shape, **ids)
    character_tokenizer(CHARACTERS, *special).save_pretrained(folder)
    return folder


def make_data(path: Path, rows: int, seed: int) -> Path:
    """Digits to sort: {"question": "sort 312=", "answer": "123"}."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(rows):
            digits = "".join(rng.choice("0123456789") for _ in range(3))
            answer = "".join(sorted(digits))
            file.write(json.dumps({"question": f"sort {digits}=", "answer": answer}) + "\n")
    return path


def sft_recipe(folder: Path, **changes: object) -> Path:
    """`folder` holds `model/` and `train.jsonl`. Values in `changes` are merged by section."""
    recipe: dict = {
        "name": "tiny-sft",
        "kind": "sft",
        "output_root": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": {
                "path": str(folder / "train.jsonl"),
                "format": "prompt_completion",
                "prompt": "question",
                "completion": "answer",
            }
        },
        "policy": {"batch_size": 8, "micro_batch_tokens": 256, "steps": 10, "optimizer": {"lr": 1e-3}},
        "checkpoint": {"save_every": 4, "max_keep": 2},
        "logging": {"wandb": {"mode": "off"}},
        "cluster": {"placement": "local", "time": "00:30:00"},
    }
    return write(folder / "sft.yaml", merge(recipe, changes))


def rl_recipe(folder: Path, **changes: object) -> Path:
    """GRPO on the same rows with the `hf` engine, two prompts of four answers per step."""
    recipe: dict = {
        "name": "tiny-grpo",
        "kind": "rl",
        "output_root": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": {
                "path": str(folder / "train.jsonl"),
                "format": "prompt_answer",
                "prompt": "question",
                "answer": "answer",
            }
        },
        "algorithm": {"name": "grpo", "group_size": 4, "max_staleness": 1},
        "plugins": [str(Path(__file__).with_name("digits_reward.py"))],
        "reward": [{"name": "digits"}, {"name": "exact", "weight": 0.0}],
        "policy": {"batch_size": 8, "micro_batch_tokens": 256, "steps": 6, "optimizer": {"lr": 1e-4}},
        "rollout": {"engine": "hf", "replicas": 1, "max_tokens": 5},
        "checkpoint": {"save_every": 2, "max_keep": 2},
        "eval": {"every": 0, "before": False},
        "logging": {"wandb": {"mode": "off"}},
        "cluster": {"placement": "local", "time": "00:30:00"},
    }
    return write(folder / "grpo.yaml", merge(recipe, changes))


def merge(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = (
            merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        )
    return merged


def write(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
