"""Models found on this machine: folders, Hub snapshots by revision; sizes from shards, configs, bad files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from hpc_rl.catalog.facts import ModelFilesError, count_parameters, read_facts
from hpc_rl.catalog.families import policy_tp_error, rollout_tp_error
from hpc_rl.catalog.local_models import find_model, find_snapshot

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def shard(path: Path, shapes: dict[str, list[int]]) -> None:
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def cached(home: Path, name: str, refs: dict[str, str]) -> Path:
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    for ref, commit in refs.items():
        (folder / "refs" / ref).write_text(commit)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def test_snapshots_are_found_by_branch_tag_and_commit(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "org/m", {"main": COMMIT, "v2": "f" * 40})
    assert find_model("org/m", None, str(tmp_path)) == snapshot
    assert find_model("org/m", COMMIT, str(tmp_path)) == snapshot
    assert find_model("org/m", "v2", str(tmp_path)) is None  # the ref is there, its files are not
    assert find_model("org/m", "v3", str(tmp_path)) is None
    assert find_model("org/other", None, str(tmp_path)) is None
    assert find_snapshot("org/m", None, str(tmp_path), "datasets") is None


def test_a_local_folder_needs_a_config(tmp_path: Path) -> None:
    assert find_model(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path)) == tmp_path


def test_parameters_are_counted_over_all_shards(tmp_path: Path) -> None:
    shard(tmp_path / "model-1.safetensors", {"a": [2, 3], "b": []})
    shard(tmp_path / "model-2.safetensors", {"c": [5]})
    assert count_parameters(tmp_path) == 12
    weight_map = {"a": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert count_parameters(tmp_path) == 12
    (tmp_path / "model-2.safetensors").unlink()
    assert count_parameters(tmp_path) is None


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 16, struct.pack("<Q", 10) + b"{not json}"])
def test_files_that_are_no_safetensors_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFilesError, match=r"model\.safetensors"):
        count_parameters(tmp_path)


def test_facts_of_an_old_style_config(tmp_path: Path) -> None:
    config = {
        "model_type": "gpt2",
        "n_head": 4,
        "n_embd": 64,
        "n_layer": 2,
        "vocab_size": 256,
        "n_positions": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = read_facts(tmp_path)
    assert facts.family is not None
    assert (facts.family.name, facts.heads, facts.kv_heads, facts.head_dim) == ("GPT-2", 4, 4, 16)
    assert facts.max_position == 128
    assert (facts.parameters, facts.parameters_from) == (
        2 * (4 * 64 * 64 + 2 * 64 * 256) + 256 * 64,
        "config",
    )


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFilesError, match=r"config\.json cannot be read"):
        read_facts(tmp_path)


@pytest.mark.torch
def test_the_estimate_agrees_with_transformers(tmp_path: Path) -> None:
    """The parameter count from the config alone, against the real class (norms and biases are left out)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    counted = sum(p.numel() for p in Qwen2ForCausalLM(config).parameters())
    estimated = read_facts(tmp_path).parameters
    assert estimated is not None
    assert estimated == pytest.approx(counted, rel=0.01)


def test_tp_rules() -> None:
    assert rollout_tp_error(32, 8, 4) is None
    assert rollout_tp_error(32, 8, 16) is None
    assert rollout_tp_error(14, 2, 4) is not None
    assert policy_tp_error(32, 8, 16) is not None
    assert policy_tp_error(32, 8, 8) is None
