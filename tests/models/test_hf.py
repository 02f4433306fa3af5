"""Loading, packing, sharding and the way back to files, against transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file

from hpc_rl.models.base import ModelError, ParallelSpec
from hpc_rl.models.hf import attention, rows
from hpc_rl.models.hf.loading import materialise
from hpc_rl.models.hf.model import HfModel, build, check_parallel
from hpc_rl.recipe.schema import Model
from tests.families import SIZES
from tests.models.contract import same_gradient
from tests.ranks import run_ranks
from tests.tiny_models import save_model

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
CPU = torch.device("cpu")
ONE = ParallelSpec(CPU, torch.float32)


def build_one(folder: Path | str, parallel: ParallelSpec = ONE, **options: object) -> HfModel:
    return build(Model(path=str(folder), dtype="float32", **options), parallel)


def packed(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    return ids, torch.cat([torch.arange(len(sequence)) for sequence in sequences])


SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], list(range(30, 70))]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3", "gpt_oss", "qwen3_moe"])
def test_no_gradient_leaks_between_packed_sequences(family: str, tmp_path: Path) -> None:
    model = build_one(save_model(tmp_path, family))
    embedding = model.module.get_input_embeddings()
    seen = []
    hook = embedding.register_forward_hook(lambda *call: seen.append(call[2]) or call[2].retain_grad())
    ids, positions = packed(SEQUENCES)
    second = torch.arange(7, 10)
    model.logits(ids, positions, second).sum().backward()
    hook.remove()
    grad = seen[0].grad[0]
    assert grad[7:10].abs().max() > 0
    assert (grad[:7] == 0).all()
    assert (grad[10:] == 0).all()


def falcon() -> T.PreTrainedConfig:
    return T.FalconConfig(vocab_size=96, hidden_size=64, num_attention_heads=2, num_hidden_layers=2)


def bloom() -> T.PreTrainedConfig:
    return T.BloomConfig(vocab_size=96, hidden_size=64, n_head=2, n_layer=2)


def mamba() -> T.PreTrainedConfig:
    return T.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8)


def qwen3_next() -> T.PreTrainedConfig:
    return T.Qwen3NextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=2, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=32, shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip


def llama4() -> T.PreTrainedConfig:
    return T.Llama4TextConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, intermediate_size_mlp=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_local_experts=2,
        attention_chunk_size=8, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
        pad_token_id=0,
    )  # fmt: skip


def phimoe() -> T.PreTrainedConfig:
    return T.PhimoeConfig(**SIZES, num_local_experts=2, sliding_window=8)


def roberta() -> T.PreTrainedConfig:
    return T.RobertaConfig(**{**SIZES, "num_key_value_heads": 2}, is_decoder=True, pad_token_id=0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (phimoe, "PhimoeAttention puts its sliding window into the mask alone"),
        (roberta, "RobertaForCausalLM counts positions in its own way"),
        (llama4, "chunked_attention layers would run on"),
        (qwen3_next, "linear_attention layers would run on"),
        (mamba, "linear_attention layers would run on"),
        (bloom, "leak into each other in BloomForCausalLM"),
        (falcon, "leak into each other in FalconForCausalLM"),
    ],
)
def test_what_cannot_be_packed_is_padded_and_said(
    config: Callable[[], Any], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    T.AutoModelForCausalLM.from_config(config(), dtype=torch.float32).save_pretrained(tmp_path)
    model = build_one(tmp_path)
    assert model.rows is rows.padded
    assert reason in caplog.text
    plain = T.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids, positions = packed(SEQUENCES)
    keep = torch.tensor([2, 3, 8, 11, 30, len(ids) - 1])
    expected = torch.cat([plain(input_ids=torch.tensor([s])).logits[0] for s in SEQUENCES])[keep]
    ours = model.logits(ids, positions, keep)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    ours.logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    named = dict(plain.named_parameters())
    for name, parameter in model.module.named_parameters():
        same_gradient(name, parameter.grad, named[name].grad)


def gpt_bigcode() -> T.PreTrainedConfig:
    return T.GPTBigCodeConfig(vocab_size=96, n_embd=64, n_head=2, n_layer=2, n_positions=41, n_inner=96)


def gpt_neo() -> T.PreTrainedConfig:
    return T.GPTNeoConfig(
        vocab_size=96, hidden_size=64, num_heads=2, num_layers=2, max_position_embeddings=41, window_size=8,
        attention_types=[[["global", "local"], 1]], intermediate_size=96,
    )  # fmt: skip


@pytest.mark.parametrize("config", [gpt_bigcode, gpt_neo])
def test_masks_in_boolean_buffers_are_made_anew(config: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    T.AutoModelForCausalLM.from_config(config(), dtype=torch.float32).save_pretrained(tmp_path)
    model = build_one(tmp_path)
    plain = T.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (model.rows is rows.padded) == (config is gpt_neo)  # the row is longer than the masks
    masks = {name: b for name, b in plain.named_buffers() if b.dtype == torch.bool}
    assert masks
    assert all(torch.equal(model.module.get_buffer(name), mask) for name, mask in masks.items())
    ids, positions = packed(SEQUENCES)
    expected = torch.cat([plain(input_ids=torch.tensor([s])).logits[0] for s in SEQUENCES])
    ours = model.logits(ids, positions, torch.arange(len(ids)))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_a_buffer_that_nobody_makes_is_an_error(dtype: torch.dtype) -> None:
    with torch.device("meta"):
        module = T.AutoModelForCausalLM.from_config(gpt_bigcode())
        module.transformer.h[0].register_buffer("extra", torch.zeros(3, dtype=dtype), persistent=False)
    with pytest.raises(ModelError, match=r"buffer transformer\.h\.0\.extra of .* is not made by"):
        materialise(module, torch.device("cpu"))


def test_an_image_at_the_start_of_a_sequence_does_not_see_the_padding() -> None:
    """Padding repeats the first token, which here belongs to an image."""
    positions = torch.cat([torch.arange(5), torch.arange(8)])
    blocks = torch.tensor([0, 0, 0, -1, -1, -1, 1, 1, 1, -1, -1, -1, -1])
    layout = attention.layout_of(positions, blocks)
    (stack,) = layout.stacks
    assert (stack.count, stack.width) == (2, 8)
    same_as_alone(layout, positions, blocks)


def test_sequences_of_one_length_with_and_without_an_image() -> None:
    """They are in two stacks, so neither stack is the row itself."""
    positions = torch.cat([torch.arange(8), torch.arange(8)])
    blocks = torch.tensor([-1, 0, 0, *[-1] * 5, *[-1] * 8])
    for numbers in (blocks, blocks.roll(8)):
        layout = attention.layout_of(positions, numbers)
        assert len(layout.stacks) == 2
        same_as_alone(layout, positions, numbers)
    assert attention.layout_of(positions, torch.full((16,), -1)).in_order


def same_as_alone(layout: attention.PackedLayout, positions: torch.Tensor, blocks: torch.Tensor) -> None:
    """Attention with a window of 2 and images in both directions, against each sequence by itself."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, len(positions), 4)
    ours, _ = attention.packed_attention(None, q, k, v, None, packed_layout=layout, sliding_window=2)
    for start, end in attention.spans_of(positions):
        i = torch.arange(end - start)
        own = blocks[start:end]
        seen = (i[:, None] >= i) & (i[:, None] - i < 2) | (own[:, None] == own) & (own >= 0)
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(t[:, :, start:end] for t in (q, k, v)), attn_mask=seen
        )
        torch.testing.assert_close(ours[:, start:end], alone.transpose(1, 2), rtol=0, atol=1e-6)


def test_rotary_embeddings_that_depend_on_the_row_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16,
        "original_max_position_embeddings": 128, "factor": 4.0, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    folder = save_model(tmp_path / "phi3", "phi3", rope_parameters=rope, original_max_position_embeddings=128)
    build_one(folder)
    assert "keep every sequence at 128 tokens or less" in caplog.text


def test_fp32_buffers_leave_as_fp32(tmp_path: Path) -> None:
    """The bias of DeepSeek-V3's router decides between experts whose scores are close."""
    config = T.DeepseekV3Config(
        vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    model = T.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(tmp_path)
    in_file = load_file(tmp_path / "model.safetensors")
    ours = build(Model(path=str(tmp_path), dtype="bfloat16"), ONE)
    sent = {name: value for bucket in ours.buckets(1 << 30) for name, value in bucket}
    (bias,) = [name for name in sent if "correction_bias" in name]
    assert torch.equal(sent[bias], in_file[bias])
    assert sent["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_a_leak_that_transformers_does_not_prevent_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_one(save_model(tmp_path / "a", "gpt_oss"), attn_implementation="eager")
    assert model.rows is rows.padded
    assert "leak into each other in GptOssForCausalLM with attention eager" in caplog.text
    assert build_one(save_model(tmp_path / "b", "qwen3"), attn_implementation="sdpa").rows is rows.packed


def test_bf16_files_become_fp32_masters_and_bf16_again(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "fp32", "qwen3")
    half = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bf16")
    model = build(Model(path=str(tmp_path / "bf16"), dtype="bfloat16"), ONE)
    assert all(p.dtype == torch.float32 for p in model.module.parameters())
    in_file = load_file(tmp_path / "bf16" / "model.safetensors")
    for bucket in model.buckets(1 << 30):
        for name, tensor in bucket:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, in_file[name])


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"num_hidden_layers": 3}, r"must be equal to the number of `layer_types`"),
        ({"num_hidden_layers": 3, "layer_types": None}, "not in the safetensors files: model.layers.2"),
        ({"intermediate_size": 256}, r"mlp.*is \[.*192.*in the files, but config.json makes it \[.*256"),
        ({"model_type": "no_such_model", "architectures": ["X"]}, "no_such_model"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=message):
            build_one(folder)
    with pytest.raises(ModelError, match="hpc-rl fetch"):
        build_one("nobody/no-such-model")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        build_one(folder)
    with pytest.raises(ModelError, match=r"policy\.parallel\.pp = 2"):
        check_parallel({"tp": 2, "pp": 2})


def test_unused_tensors_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_model(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "layer_types": None}))
    build_one(folder)
    assert "are not used: model.layers.1" in caplog.text


def check_sharded(rank: int, world_size: int, folder: str, replicate: int, dtype: str) -> None:
    compute = getattr(torch, dtype)
    spec = ParallelSpec(CPU, compute, dp_replicate=replicate, dp_shard=world_size // replicate)
    model = build_one(folder, spec)
    reference = build_one(folder)
    local = sum(p.to_local().numel() for p in model.module.parameters())
    assert local <= reference.num_parameters() / (world_size // replicate) * 1.1
    tied = model.module.all_tied_weights_keys
    for copy, original in tied.items():
        assert model.module.get_parameter(copy) is model.module.get_parameter(original)
    ids, positions = packed(SEQUENCES)
    keep = torch.arange(0, len(ids), 2)
    ours, expected = (m.logits(ids, positions, keep) for m in (model, reference))
    assert ours.dtype == compute
    tolerance = 1e-5 if compute == torch.float32 else 5e-2
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=tolerance)
    ours.float().logsumexp(-1).sum().backward()
    expected.logsumexp(-1).sum().backward()
    grads = dict(reference.module.named_parameters())
    for name, parameter in model.module.named_parameters():
        assert parameter.grad.dtype == torch.float32
        full = parameter.grad.full_tensor()
        scale = grads[name].grad.abs().max() + 1e-6
        assert (full - grads[name].grad).abs().max() <= (1e-4 if compute == torch.float32 else 0.1) * scale, (
            name
        )
    in_file = load_file(Path(folder) / "model.safetensors")
    sent = [pair for bucket in model.buckets(150_000) for pair in bucket]
    assert sorted(name for name, _ in sent) == sorted(in_file)
    assert all(torch.equal(tensor, in_file[name]) for name, tensor in sent)


@pytest.mark.parametrize(
    ("family", "world_size", "replicate", "dtype"),
    [
        ("qwen2", 2, 1, "float32"),
        ("qwen3_moe", 2, 1, "float32"),
        ("qwen3", 2, 1, "bfloat16"),
        ("llama", 4, 2, "float32"),
    ],
)
def test_sharded_equals_whole(
    family: str, world_size: int, replicate: int, dtype: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "model", family)
    run_ranks(check_sharded, world_size, tmp_path, str(folder), replicate, dtype)
