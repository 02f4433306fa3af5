"""What the families' contract does not go through: two-dimensional meshes, offload, blanks, checkpointing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hpc_rl.models.base import ModelError, ParallelSpec
from hpc_rl.models.hf import tensor_parallel
from tests.models import contract as c
from tests.ranks import run_ranks

pytestmark = [pytest.mark.torch, pytest.mark.slow]
torch.set_num_threads(1)


def gradients(folder: Path | str, rows: list[c.Row], spec: ParallelSpec = c.ONE) -> dict[str, torch.Tensor]:
    model = c.build_model(folder, spec)
    for row in rows:
        c.loss_of(model, row, 50).backward()
    return {name: c.full(p.grad) for name, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["gemma3_vlm", "mllama", "qwen2_5_vl"])
def test_a_blank_image_changes_no_gradient(family: str, tmp_path: Path) -> None:
    """The vision tower has none without the blank, and one of zero with it."""
    folder = c.save(tmp_path, family)
    text = c.rows_of(family)[3]
    without = gradients(folder, [text])
    with_blank = gradients(folder, [[*text, c.blank_of(family)]])
    assert with_blank.keys() > without.keys()
    for name, gradient in with_blank.items():
        c.same_gradient(name, gradient, without.get(name))
        if name not in without:
            assert not gradient.any(), name


@pytest.mark.parametrize("family", ["gemma3_vlm", "mllama", "qwen3_vl", "qwen3_moe"])
def test_activation_checkpointing_changes_nothing(family: str, tmp_path: Path) -> None:
    folder, rows = c.save(tmp_path, family), c.rows_of(family)
    plain = gradients(folder, rows)
    spared = gradients(folder, rows, replace(c.ONE, activation_checkpointing=True))
    assert plain.keys() == spared.keys()
    for name, gradient in spared.items():
        c.same_gradient(name, gradient, plain[name])


def check_two_dimensions(rank: int, _: int, folder: str, scratch: str) -> None:
    rows, _, expected = torch.load(Path(scratch) / "expected.pt", weights_only=False)
    spec = ParallelSpec(c.CPU, torch.float32, dp_shard=2, tp=2, activation_checkpointing=True)
    c.train_and_compare(folder, spec, rank, rows, None, expected)
    model = c.build_model(folder, spec)
    c.loss_of(model, rows[rank // 2], 50).backward()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]  # tensor-parallel groups are neighbours
    whole = [n for n, p in model.module.named_parameters() if p.device_mesh.ndim == 1]
    assert any("norm" in name for name in whole)
    for name in whole:
        gradient = model.module.get_parameter(name).grad.to_local()
        first = gradient.clone()
        dist.broadcast(first, src=rank // 2 * 2, group=pairs[rank // 2])
        assert torch.equal(first, gradient), name
    share = sum(p.to_local().numel() for p in model.module.parameters()) / model.num_parameters()
    assert share < 0.3, share


@pytest.mark.parametrize("family", ["qwen3_moe", "phi3"])
def test_fsdp_around_tensor_parallelism(family: str, tmp_path: Path) -> None:
    """2 x 2: losses, gradients and the way from and to the file; norms alike on tensor-parallel ranks."""
    folder, rows = c.save(tmp_path / "model", family), c.rows_of(family)
    expected = {
        name: vars(c.train(c.build_model(folder), name, rows, c.tokens_of(rows), c.ONE))
        for name in c.OPTIMIZERS
    }
    torch.save((rows, None, expected), tmp_path / "expected.pt")
    run_ranks(check_two_dimensions, 4, tmp_path, str(folder), str(tmp_path))


def check_offload(rank: int, _: int, folder: str, scratch: str) -> None:
    rows, blank, expected = torch.load(Path(scratch) / "expected.pt", weights_only=False)
    spec = ParallelSpec(c.CPU, torch.float32, dp_shard=2, cpu_offload=True)
    c.train_and_compare(folder, spec, rank, rows, blank, expected)


def test_cpu_offload_trains_the_same(tmp_path: Path) -> None:
    folder, rows = c.save(tmp_path / "model", "gemma3_vlm"), c.rows_of("gemma3_vlm")
    expected = {"adamw": vars(c.train(c.build_model(folder), "adamw", rows, c.tokens_of(rows), c.ONE))}
    torch.save((rows, c.blank_of("gemma3_vlm"), expected), tmp_path / "expected.pt")
    run_ranks(check_offload, 2, tmp_path, str(folder), str(tmp_path))


def test_bf16_keeps_what_must_be_fp32(tmp_path: Path) -> None:
    """Master weights, gradients and rotary frequencies are fp32; logits are bf16 and near the fp32 ones."""
    folder, rows = c.save(tmp_path, "qwen2_5_vl"), c.rows_of("qwen2_5_vl")
    with c.world(tmp_path, "store", 0, 1):
        half = c.build_model(folder, ParallelSpec(c.CPU, torch.bfloat16))
        ids, positions, keep, _, media = c.tensors(rows[1])
        logits = half.logits(ids, positions, keep, media)
        logits.float().logsumexp(-1).sum().backward()
        assert logits.dtype == torch.bfloat16
        for name, parameter in half.module.named_parameters():
            assert parameter.dtype == torch.float32
            assert parameter.grad is None or parameter.grad.dtype == torch.float32, name
        assert all(b.dtype == torch.float32 for n, b in half.module.named_buffers() if "inv_freq" in n)
    exact = c.build_model(folder).logits(ids, positions, keep, media)
    assert float((logits.float() - exact).abs().max()) < 0.05


def check_refusals(rank: int, _: int, folders: dict[str, str]) -> None:
    for family, said in [
        ("mllama", "no tensor-parallel plan for MllamaForConditionalGeneration"),
        ("gpt_oss", "no tensor-parallel plan for GptOssForCausalLM"),
        ("qwen3", "tp = 2 does not divide the 4 attention heads and 1 key/value heads"),
    ]:
        with pytest.raises(ModelError, match=said):
            c.build_model(folders[family], c.TP2)


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    folders = {family: str(c.save(tmp_path / family, family)) for family in ("mllama", "gpt_oss")}
    folders["qwen3"] = str(c.save(tmp_path / "qwen3", "qwen3", num_key_value_heads=1))
    run_ranks(check_refusals, 2, tmp_path, folders)


def test_a_vocabulary_that_does_not_divide_is_not_split() -> None:
    """Tied or not, embedding and head then stay whole; tied ones are split alike."""
    import transformers as T

    for tied, vocabulary in [(True, 96), (True, 97), (False, 96), (False, 97)]:
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = T.LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)
        with torch.device("meta"):
            plan = tensor_parallel.plan_of(T.LlamaForCausalLM(config), 2)
        ends = (plan.get("model.embed_tokens"), plan.get("lm_head"))
        head = "colwise_gather_output"
        if vocabulary == 97:
            assert ends == (None, None)
        else:
            assert ends == (("embedding_rowwise", head) if tied else (None, head))
