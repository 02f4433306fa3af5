"""Memory of the policy: frozen parts, adapters, averages, meshes, and state on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.plan import Plan
from hpc_rl.plan.memory import auto_transport, copies_note, trained_parameters
from hpc_rl.plan.schema import Group
from hpc_rl.recipe import load_recipe
from hpc_rl.recipe.schema import Lora, Model

Make = Callable[..., Plan]
GIB = 2**30
# A language model with a vision tower, by the names of its files.
SHAPES = {
    "model.embed_tokens.weight": [1000, 64],
    "model.layers.0.self_attn.q_proj.weight": [64, 64],
    "model.layers.0.mlp.down_proj.weight": [64, 256],
    "model.layers.0.input_layernorm.weight": [64],
    "vision_tower.blocks.0.fc.weight": [32, 32],
    "lm_head.weight": [1000, 64],
}
TOTAL = 2 * 64000 + 64 * 64 + 64 * 256 + 64 + 32 * 32
CONFIG = {
    "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 64,
    "num_hidden_layers": 1, "vocab_size": 1000, "intermediate_size": 256,
}  # fmt: skip


def trained(**keys: Any) -> tuple[int, int]:
    return trained_parameters(Model(path="x", **keys), TOTAL, SHAPES)


def test_what_is_trained() -> None:
    assert trained() == (0, TOTAL)
    assert trained(freeze=[r"(^|\.)vision_tower\."]) == (0, TOTAL - 32 * 32)
    assert trained(train=[r"layers\.0\."]) == (0, 64 * 64 + 64 * 256 + 64)
    assert trained(train=["layers"], freeze=["norm"]) == (0, 64 * 64 + 64 * 256)
    assert trained(freeze=["("]) == (0, TOTAL)  # said elsewhere; here it freezes nothing


ADAPTERS = [
    # every linear layer, not the embeddings and the head
    (Lora(r=8), 8 * (128 + 320 + 64)),
    (Lora(r=8, target_modules=["q_proj"]), 8 * 128),
    (Lora(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"]), 8 * 128 + 64000),
    (Lora(r=8, exclude_modules=["fc"]), 8 * (128 + 320)),
    (Lora(r=8, r_pattern={"q_proj": 2}), 2 * 128 + 8 * (320 + 64)),
]


MOE = {
    **{f"layers.0.mlp.experts.{i}.{name}.weight": shape for i in range(4)
       for name, shape in (("gate_proj", [96, 64]), ("up_proj", [96, 64]), ("down_proj", [64, 96]))},
    "layers.0.attn.q_proj.weight": [64, 64],
    "layers.1.mlp.experts.gate_up_proj": [4, 64, 192],
}  # fmt: skip


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (Lora(r=8), 8 * 128),
        (Lora(r=8, target_modules=[], target_parameters=["experts.gate_up_proj"]), 2 * 8 * 4 * (64 + 192)),
        (
            Lora(r=8, target_parameters=["experts.down_proj"], r_pattern={"experts.down_proj": 2}),
            8 * 128 + 4 * 2 * (64 + 96),
        ),
    ],
    ids=["none", "gate_up", "down"],
)
def test_adapters_of_experts(lora: Lora, expected: int) -> None:
    """They are counted as they lie in memory, whether files have them one by one or in one tensor."""
    assert trained_parameters(Model(path="x", lora=lora), TOTAL, MOE) == (expected, expected)


@pytest.mark.parametrize(("lora", "expected"), ADAPTERS, ids=[str(index) for index in range(len(ADAPTERS))])
def test_an_adapter_is_what_is_added_and_trained(lora: Lora, expected: int) -> None:
    assert trained(lora=lora) == (expected, expected)


def test_an_adapter_of_an_unknown_model_is_small(plan: Make, model_folder: Callable[..., Path]) -> None:
    assert trained_parameters(Model(path="x", lora=Lora(r=16)), 14_000_000_000, None)[1] < 140_000_000


@pytest.fixture
def make(plan: Make, model_folder: Callable[..., Path]) -> Make:
    """A plan of the GSM8K SFT recipe with the model above."""
    path = model_folder(SHAPES, **CONFIG)
    words = [f"model.path={path}", "policy.batch_size=64"]
    return lambda *overrides, **keys: plan(*words, *overrides, recipe="gsm8k-sft", **keys)


def test_the_mesh_divides_it_but_for_replicas(make: Make) -> None:
    for parallel, shards in (
        ("{dp_shard: 4}", 4),
        ("{dp_shard: 2, tp: 2}", 4),
        ("{dp_replicate: 4, dp_shard: 2}", 2),
    ):
        memory = make(f"policy.parallel={parallel}").memory
        assert memory is not None
        assert memory.weights_gb == round(4 * TOTAL / shards / GIB, 3)
        assert memory.optimizer_gb == round(8 * TOTAL / shards / GIB, 3)


BIG = {"a.weight": [40960, 65536], "b.weight": [40960, 65536]}  # 5.4 billion


@pytest.fixture
def big(plan: Make, tmp_path: Path) -> Callable[..., Any]:
    """The memory of a plan of 5.4 billion parameters on one GPU of 80 GiB, by the header alone."""
    import json
    import struct

    folder = tmp_path / "big"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in BIG.items()}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    words = [f"model.path={folder}", "policy.parallel={dp_shard: 1}"]

    def made(*overrides: str) -> Plan:
        return plan(*words, *overrides, recipe="gsm8k-sft")

    return made


def test_what_does_not_fit_is_said_once_and_only_then(big: Callable[..., Plan]) -> None:
    each = 4 * 2 * 40960 * 65536 / GIB  # 20 GiB
    full = big()
    assert full.memory is not None
    assert (full.memory.total_gb, full.memory.on_host) == (4 * each, False)
    assert full.warnings == []  # 80 of 80 GiB
    (warning,) = big("policy.ema={}").warnings
    assert "weights 20.0 + gradients 20.0 + optimizer 40.0 + average 20.0 = 100.0 GiB per GPU" in warning
    assert big("policy.ema={}", "model.freeze=['^a']").warnings == []
    assert big("policy.ema={}", "policy.optimizer.name=sgd").warnings == []
    assert big("policy.ema={}", "policy.cpu_offload=true").warnings == []
    lora = big("policy.ema={}", "model.lora={r: 16}").memory
    assert lora is not None
    assert lora.trained == 2 * 16 * (40960 + 65536)
    assert lora.weights_gb == pytest.approx(each, abs=0.02)
    assert lora.gradients_gb < 0.02


def test_the_summary_says_where_the_state_lies(big: Callable[..., Plan]) -> None:
    from hpc_rl.cli._summary import plan_summary

    assert "80.0 GiB of 80 GiB (weights 20.0, gradients 20.0, optimizer 40.0), before" in plan_summary(big())
    assert "100.0 GiB of the node (" in plan_summary(big("policy.ema={}", "policy.cpu_offload=true"))
    assert "M parameters, 2,684 M trained" in plan_summary(big("model.freeze=['^a']"))


def test_check_says_what_copies_of_the_weights_cost_the_hosts() -> None:
    recipe = load_recipe("gsm8k-grpo", ["rollout.parallel.tp=2"]).recipe
    cpus = [Group.model_construct(role=role, gpus_per_task=0) for role in ("policy", "rollout")]
    gpus = [Group.model_construct(role=role, gpus_per_task=1) for role in ("policy", "rollout")]
    note = copies_note(recipe, 2**30, cpus)
    assert "policy rank 0 and each of the 2 workers of a replica keep a copy of the weights" in note
    assert "2.00 GiB" in note
    assert copies_note(recipe, 2**30, gpus) == ""  # nccl, out of GPU memory
    assert copies_note(recipe, 2**30, cpus, adapter=True) == ""
    assert recipe.rollout is not None
    recipe.rollout.weights.mode = "delta"
    assert "2.00 GiB" in copies_note(recipe, 2**30, gpus)
    assert auto_transport(recipe.rollout.weights, on_gpu=True) == "gloo"
    recipe.rollout.weights.mode, recipe.rollout.weights.overlap = "full", False
    assert copies_note(recipe, 2**30, cpus) == ""
    assert auto_transport(recipe.rollout.weights, on_gpu=True) == "nccl"
