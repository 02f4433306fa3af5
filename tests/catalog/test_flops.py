"""Counts of well-known models, and peaks by the names that drivers give."""

from __future__ import annotations

import pytest

from hpc_rl.catalog.flops import model_flops
from hpc_rl.catalog.gpus import peak_flops

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
QWEN3_30B_A3B = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "num_experts": 128, "num_experts_per_tok": 8,
}  # fmt: skip
GPT2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_inner": None}


@pytest.mark.parametrize(
    ("config", "active"),
    [
        (LLAMA_8B, 8.03e9 - 128256 * 4096),  # as published, without the embedding
        ({"text_config": LLAMA_8B, "vision_config": {"hidden_size": 9}}, 8.03e9 - 128256 * 4096),
        (QWEN3_30B_A3B, 3.3e9 - 151936 * 2048),
        (GPT2, 124.4e6 - 1024 * 768),  # the head is the embedding; positions are looked up
    ],
)
def test_active_parameters(config: dict, active: float) -> None:
    found = model_flops(config)
    assert found is not None
    assert found.body + found.head == pytest.approx(active, rel=0.02)


def test_a_step() -> None:
    found = model_flops(LLAMA_8B)
    assert found is not None
    assert found.attention == 32 * 4096
    assert found.step(10, 10, 0) == 60 * (found.body + found.head)
    assert found.step(10, 4, 0) == 60 * found.body + 24 * found.head
    assert found.step(0, 0, 100) == 1200 * 32 * 4096
    assert found.step(10, 10, 0, trained_share=0.0) == 40 * (found.body + found.head)


def test_other_architectures_have_no_count() -> None:
    assert model_flops({"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9}) is None
    assert model_flops({**LLAMA_8B, "intermediate_size": None}) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA B200", 2250.0),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)
