"""The head in chunks inside real models, against their own logits: families, meshes, and where it gives up.

Tolerances, fixed before any result was seen: log-probs 8e-6 (some units in the last place of 10 nats), their
mean and gradients 1e-6, and gradients as `contract` has them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

from hpc_rl.algorithms import chunked_head as chunks
from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.algorithms.sft import Sft
from hpc_rl.models.base import ParallelSpec, Row
from hpc_rl.models.hf.head import chunked_head
from hpc_rl.models.hf.model import HfModel
from hpc_rl.policy.step import Ranks, StepRunner
from hpc_rl.recipe.schema import Lora
from hpc_rl.types import TrainSample
from tests.models import contract as c
from tests.ranks import run_ranks

pytestmark = [pytest.mark.torch, pytest.mark.slow]
torch.set_num_threads(1)
TOKENS = 50
ROWS = 8  # of a chunk; the tiny models' vocabulary has 96 words
FSDP2 = ParallelSpec(c.CPU, torch.float32, dp_shard=2)
HSDP = ParallelSpec(c.CPU, torch.float32, dp_replicate=2, dp_shard=2)


def small_chunks(rows: int = ROWS) -> None:
    chunks.CHUNK_ELEMENTS["cpu"] = rows * 96


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks.CHUNK_ELEMENTS, "cpu", ROWS * 96)


def parts(model: HfModel, row: c.Row, way: str) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy at temperature 0.9."""
    ids, positions, keep, targets, media = c.tensors(row)
    assert len(keep) > ROWS
    if way == "logits":
        found = token_log_probs(model.logits(ids, positions, keep, media), targets, 0.9, True)
    else:
        weights = torch.full((len(keep),), 1 / TOKENS) if way == "known" else None
        found = model.log_probs(Row(ids, positions, keep, targets, media), 0.9, True, weights)
    assert found[1] is not None
    return found[0], found[1]


def gradients(model: HfModel, rows: list[c.Row], way: str, data_parallel: int = 1) -> dict[str, Tensor]:
    """Those of the mean loss, added up over `rows`; the parameters have none afterwards."""
    for number, row in enumerate(rows):
        if model.sharded:
            model.module.set_requires_all_reduce(number == len(rows) - 1)
        (-parts(model, row, way)[0].sum() / TOKENS * data_parallel).backward()
    named = model.module.named_parameters()
    found = {name: c.full(p.grad) for name, p in named if p.grad is not None}
    model.module.zero_grad(set_to_none=True)
    return found


def same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        c.same_gradient(name, gradient, expected[name])
        limit = 1e-6 * max(1.0, float(expected[name].abs().max()))
        assert float((gradient - expected[name]).abs().max()) <= limit, name


def spread(model: HfModel) -> None:
    """Logits of a real model's size: those of a random one are so small that soft caps do nothing."""
    with torch.no_grad():
        model.module.get_output_embeddings().weight.mul_(8.0)


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied", "qwen2", "gemma2", "phi3", "gpt_oss", "qwen2_5_vl"]
)
def test_families(family: str, tmp_path: Path) -> None:
    changes = {"final_logit_softcapping": 2.0} if family == "gemma2" else {}
    model = c.build_model(c.save(tmp_path, family, **changes))
    assert model.head is not None
    assert model.head.soft_cap == changes.get("final_logit_softcapping")
    spread(model)
    rows = c.rows_of(family)
    for row in rows:
        expected, entropy = parts(model, row, "logits")
        for way in ("any", "known"):
            ours, ours_entropy = parts(model, row, way)
            assert float((ours - expected).detach().abs().max()) <= 8e-6
            assert abs(float((ours - expected).detach().mean())) <= 1e-6
            assert float((ours_entropy - entropy).abs().max()) <= 1e-5
    expected_gradients = gradients(model, rows, "logits")
    for way in ("any", "known"):
        same(gradients(model, rows, way), expected_gradients)


@pytest.mark.parametrize(
    ("cls", "key"), [("CohereConfig", "logit_scale"), ("GraniteConfig", "logits_scaling")]
)
def test_scaled_logits(cls: str, key: str, tmp_path: Path) -> None:
    """Cohere multiplies, Granite divides: which it is, is found out."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = getattr(T, cls)(**sizes, **heads, eos_token_id=2, **{key: 4.0})
    torch.manual_seed(0)
    T.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = c.build_model(tmp_path)
    assert model.head is not None
    assert model.head.scale == (4.0 if cls == "CohereConfig" else 0.25)
    rows = c.rows_of("llama")
    same(gradients(model, rows, "any"), gradients(model, rows, "logits"))


def check_ranks(rank: int, _: int, folder: str, scratch: str, spec: ParallelSpec) -> None:
    small_chunks()
    rows, expected = torch.load(Path(scratch) / "expected.pt", weights_only=False)
    model = c.build_model(folder, spec)
    assert model.head is not None
    assert model.head.plain == (spec.tp == 1)
    own = rows[rank // spec.tp :: spec.data_parallel]
    for way in ("any", "known", "any"):
        same(gradients(model, own, way, spec.data_parallel), expected)


@pytest.mark.parametrize("family", ["llama_tied", "gemma2"])
@pytest.mark.parametrize("spec", [FSDP2, HSDP, c.TP2], ids=["fsdp", "hsdp", "tp"])
def test_meshes(family: str, spec: ParallelSpec, tmp_path: Path) -> None:
    folder, rows = c.save(tmp_path / "model", family), c.rows_of(family)
    torch.save((rows, gradients(c.build_model(folder), rows, "logits")), tmp_path / "expected.pt")
    ranks = spec.data_parallel * spec.tp
    run_ranks(check_ranks, ranks, tmp_path, str(folder), str(tmp_path), spec)


def check_head_alone(rank: int, _: int, folder: str) -> None:
    """Only the head is trained: nothing before it has a gradient for FSDP to hang its backward on."""
    small_chunks()
    model = c.build_model(folder, FSDP2, train=["lm_head"])
    assert model.head is not None
    rows = c.rows_of("llama")[rank::2]
    expected = gradients(model, rows, "logits", 2)
    assert list(expected) == ["lm_head.weight"]
    for way in ("any", "known"):
        same(gradients(model, rows, way, 2), expected)


def test_the_head_alone_is_trained(tmp_path: Path) -> None:
    run_ranks(check_head_alone, 2, tmp_path, str(c.save(tmp_path / "model", "llama")))


def test_bf16(tmp_path: Path) -> None:
    """The weight's gradient is fp32 in the end and near the fp32 model's; log-probs are fp32."""
    folder, rows = c.save(tmp_path, "llama"), c.rows_of("llama")
    expected = gradients(c.build_model(folder), rows, "logits")["lm_head.weight"]
    with c.world(tmp_path, "store", 0, 1):
        half = c.build_model(folder, ParallelSpec(c.CPU, torch.bfloat16))
        assert half.head is not None
        assert parts(half, rows[0], "any")[0].dtype == torch.float32
        for way in ("any", "known"):
            found = gradients(half, rows, way)["lm_head.weight"]
            assert found.dtype == torch.float32
            assert float((found - expected).norm() / expected.norm()) < 0.05


def test_activation_checkpointing(tmp_path: Path) -> None:
    folder, rows = c.save(tmp_path, "llama"), c.rows_of("llama")
    expected = gradients(c.build_model(folder), rows, "logits")
    spared = c.build_model(folder, ParallelSpec(c.CPU, torch.float32, activation_checkpointing=True))
    same(gradients(spared, rows, "any"), expected)


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}]
)
def test_a_head_with_an_adapter_is_called_itself(options: dict[str, Any], tmp_path: Path) -> None:
    model = c.build_model(c.save(tmp_path, "llama"), lora=Lora(**{"target_modules": ["q_proj"], **options}))
    assert model.head is not None
    assert not model.head.plain
    rows = c.rows_of("llama")
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.01)  # a fresh adapter's second factor is zero, and the first's gradient
    expected = gradients(model, rows, "logits")
    assert any("lm_head" in name for name in expected)
    for way in ("any", "known"):
        same(gradients(model, rows, way), expected)


def test_adapters_elsewhere(tmp_path: Path) -> None:
    """The head's weight is frozen: only what goes into it has a gradient."""
    model = c.build_model(c.save(tmp_path, "llama"), lora=Lora(target_modules=["q_proj"]))
    assert model.head is not None
    assert model.head.plain
    rows = c.rows_of("llama")
    expected = gradients(model, rows, "logits")
    for way in ("any", "known"):
        same(gradients(model, rows, way), expected)


def test_what_comes_after_the_head_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And then logits are made, as by a model without a head in chunks."""

    def hotter(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = output.logits * 1.5
        return output

    model = c.build_model(c.save(tmp_path, "llama"))
    model.module.register_forward_hook(hotter)
    with caplog.at_level(logging.INFO, "hpc_rl.models"):
        model.head = chunked_head(model.module, c.ONE, sharded=False)
    assert model.head is None
    assert "LlamaForCausalLM makes the logits of all trained tokens at once" in caplog.text
    row = c.rows_of("llama")[0]
    assert torch.equal(parts(model, row, "any")[0], parts(model, row, "logits")[0])


def test_few_tokens_take_the_logits(tmp_path: Path) -> None:
    """One chunk is no smaller than the logits, and nothing is to be made twice."""
    model = c.build_model(c.save(tmp_path, "llama"))
    assert model.head is not None
    small_chunks(12)
    assert not model.head.pays(torch.arange(12))
    assert model.head.pays(torch.arange(13))


def test_a_step_of_sft(tmp_path: Path) -> None:
    """The policy's step, with the weights that SFT knows: loss, sums and gradients."""
    model = c.build_model(c.save(tmp_path, "llama"))
    runner = StepRunner(model, Sft(), Ranks(0, 1, 1, 1, c.CPU), sharded=False)
    samples = [
        [TrainSample(o, 0, list(range(5, 35 + o)), [0] + [1] * (29 + o), [], []) for o in (0, 1)],
        [TrainSample(2, 0, list(range(50, 70)), [0] * 20, [], [])],  # nothing to train on
    ]
    found = []
    for rows in (ROWS, 10_000):
        small_chunks(rows)
        totals = runner.forward_backward(samples, 59.0)
        grads = {name: c.full(p.grad) for name, p in model.module.named_parameters() if p.grad is not None}
        model.module.zero_grad(set_to_none=True)
        found.append((float(torch.stack(totals.losses).sum()), totals.sums, grads))
    (loss, sums, ours), (wanted_loss, wanted_sums, expected) = found
    assert abs(loss - wanted_loss) <= 1e-6
    assert float(sums["tokens"]) == float(wanted_sums["tokens"]) == 59.0
    same(ours, expected)
