"""LoRA: against PEFT itself, sharded against whole, through checkpoints and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from hpc_rl.checkpoint.export import Export, write_now
from hpc_rl.models.base import ModelError, ParallelSpec
from hpc_rl.models.blocks import held_blocks
from hpc_rl.models.hf import lora, rows
from hpc_rl.models.hf.adapted import AdaptedModel, adapter_export
from hpc_rl.models.hf.model import build
from hpc_rl.models.hf.preflight import refusal
from hpc_rl.recipe.schema import Lora, Model
from tests.ranks import run_ranks
from tests.tiny_models import save_model

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
CPU = torch.device("cpu")
ONE = ParallelSpec(CPU, torch.float32)
IDS = torch.arange(5, 45)
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
POSITIONS = torch.cat([torch.arange(15), torch.arange(25)])


def adapted(folder: Path | str, parallel: ParallelSpec = ONE, **options: Any) -> AdaptedModel:
    spec = Model(path=str(folder), dtype="float32", lora=Lora(**{"r": 4, "alpha": 8, **options}))
    model = build(spec, parallel, seed=5)
    assert isinstance(model, AdaptedModel)
    return model


@torch.no_grad()
def stir(model: AdaptedModel) -> None:
    """B is zero at first, which would hide any mistake."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.module.parameters() if p.requires_grad):
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.data
        for block in held_blocks(parameter):
            local[block.of_local()].add_(noise[block.of_full()])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {}),
        ("phi3", {"use_rslora": True}),
        ("qwen3_moe", {"r_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}),
        ("llama", {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]}),
        ("gpt_oss", {"target_parameters": EXPERTS, "use_rslora": True}),
        ("mixtral", {"target_parameters": EXPERTS, "target_modules": []}),
        ("qwen3_moe", {"target_parameters": [*EXPERTS, "mlp.gate.weight"], "r_pattern": {".*down_proj": 2}}),
    ],
)
def test_adapted_merged_and_saved_are_one_model(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder = save_model(tmp_path / "base", family)
    model = adapted(folder, **options)
    plain = T.AutoModelForCausalLM.from_pretrained(folder)
    in_file = load_file(folder / "model.safetensors")
    sent = {name: value for bucket in model.buckets(1 << 30) for name, value in bucket}
    assert sent.keys() == in_file.keys()
    assert all(torch.equal(sent[name], in_file[name]) for name in sent), "adapters change nothing at first"

    stir(model)
    with torch.no_grad():
        ours = model.logits(IDS, POSITIONS, torch.arange(15))
        assert (ours - plain(IDS[None, :15]).logits[0]).abs().max() > 1e-2
    source, also = adapter_export(model, Lora(**{"r": 4, "alpha": 8, **options}))
    out = write_now(source, Export(tmp_path / "out", folder, None, torch.float32, also), tmp_path / ".out")
    merged = T.AutoModelForCausalLM.from_pretrained(out)
    loaded = peft.PeftModel.from_pretrained(T.AutoModelForCausalLM.from_pretrained(folder), out / "adapter")
    for other in (merged, loaded):
        with torch.no_grad():
            theirs = other(IDS[None, :15]).logits[0]
        assert (ours - theirs).abs().max() <= 1e-5
    by_peft = loaded.merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        assert (value - by_peft[name]).abs().max() <= 1e-6, name

    # An adapter that PEFT reads is one to go on from.
    again = adapted(folder, **options, adapter=str(out / "adapter"))
    with torch.no_grad():
        assert torch.equal(again.logits(IDS, POSITIONS, torch.arange(15)), ours)


def test_an_adapter_that_was_trained_with_dropout_can_be_gone_on_from(tmp_path: Path) -> None:
    """Rows stay packed (dropout is no leak), and the dropout is that of the recipe."""
    folder = save_model(tmp_path / "base", "qwen2")
    model = adapted(folder, dropout=0.5)
    assert model.module.training
    stir(model)
    source, also = adapter_export(model, Lora(r=4, alpha=8, dropout=0.5))
    out = write_now(source, Export(tmp_path / "out", folder, None, torch.float32, also), tmp_path / ".out")
    saved = peft.LoraConfig.from_pretrained(str(out / "adapter"))
    assert saved.lora_dropout == 0.5
    for dropout in (0.0, 0.5):
        again = adapted(folder, dropout=dropout, adapter=str(out / "adapter"))
        assert again.rows is rows.packed
        with torch.no_grad():
            first, second = (again.logits(IDS, POSITIONS, torch.arange(15)) for _ in range(2))
        assert torch.equal(first, second) == (dropout == 0.0)


def test_an_adapter_can_be_exported_alone(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "base", "qwen3")
    model = adapted(folder)
    stir(model)
    source, also = adapter_export(model, Lora(r=4, alpha=8, export="adapter"))
    out = write_now(source, Export(tmp_path / "out", folder, None, torch.float32, also), tmp_path / ".out")
    assert not list(out.glob("model*.safetensors"))
    with torch.no_grad():
        ours = model.logits(IDS, POSITIONS, torch.arange(15))
        for loader in (
            T.AutoModelForCausalLM,
            peft.AutoPeftModelForCausalLM,
        ):  # both find the base by the config
            loaded = loader.from_pretrained(out)
            assert (ours - loaded(IDS[None, :15]).logits[0]).abs().max() <= 1e-5


def train(model: AdaptedModel, steps: int) -> list[float]:
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(steps):
        logits = model.logits(IDS, POSITIONS, torch.arange(15, 39)).float()
        loss = torch.nn.functional.cross_entropy(logits, IDS[16:40].roll(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


SHARDED: dict[str, dict[str, Any]] = {
    "llama": {"modules_to_save": ["lm_head"]},
    "mixtral": {"target_parameters": EXPERTS},
    "gpt_oss": {"target_parameters": EXPERTS, "target_modules": []},
}


def check_sharded(rank: int, world_size: int, folders: dict[str, str]) -> None:
    for family, folder in folders.items():
        sharded = ParallelSpec(CPU, torch.float32, dp_shard=2, activation_checkpointing=family == "mixtral")
        whole, ours = adapted(folder, **SHARDED[family]), adapted(folder, sharded, **SHARDED[family])
        for (name, a), (_, b) in zip(
            ours.module.named_parameters(), whole.module.named_parameters(), strict=True
        ):
            assert torch.equal(a.full_tensor(), b), f"{family}: {name} begins elsewhere"
        expected, found = train(whole, 4), train(ours, 4)
        assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 1e-5, (expected, found)
        pairs = [dict(p for bucket in m.buckets(1 << 30) for p in bucket) for m in (whole, ours)]
        for name, value in pairs[0].items():
            assert (value - pairs[1][name]).abs().max() <= 1e-5, f"{family}: {name}"
        ours_adapter = ours.adapter()
        for name, value in whole.adapter().items():
            assert (value - ours_adapter[name]).abs().max() <= 1e-5, f"{family}: {name}"
    with pytest.raises(ModelError, match="experts in one tensor are not split by tensor"):
        adapted(folders["mixtral"], ParallelSpec(CPU, torch.float32, tp=2), **SHARDED["mixtral"])


def test_sharded_equals_whole(tmp_path: Path) -> None:
    folders = {family: str(save_model(tmp_path / family, family)) for family in SHARDED}
    run_ranks(check_sharded, 2, tmp_path, folders)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "qwen2",
            {"target_modules": ["nope"]},
            r"model\.lora\.target_modules: 'nope' names nothing; near it: .*o_proj",
        ),
        ("qwen2", {"target_modules": ["embed_tokens"]}, r"embed_tokens is a Embedding; only linear layers"),
        ("qwen2", {"modules_to_save": ["lm_head"]}, "tied to another weight"),
        ("qwen2", {"adapter": "nowhere"}, r"model\.lora\.adapter: nowhere has no adapter_config\.json"),
        ("qwen2", {"target_modules": ["q_proj", "qproj"]}, r"'qproj' names nothing; near it: .*q_proj"),
        ("qwen2", {"r_pattern": {"nope": 2}}, r"model\.lora\.r_pattern: 'nope' names nothing"),
        ("mixtral", {"target_modules": ["w1", "w2", "w3"]}, "experts in one tensor: target_parameters"),
        ("qwen3_moe", {"target_modules": ["experts"]}, r"Qwen3MoeExperts\(.* is not supported"),
        (
            "qwen3_moe",
            {"target_parameters": ["experts.up"]},
            "'experts.up' names nothing; near it: .*up_proj",
        ),
        ("mixtral", {"target_parameters": EXPERTS, "dropout": 0.1}, "does not work with lora_dropout"),
    ],
)
def test_what_does_not_fit_is_named(
    family: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, family)
    with pytest.raises(ModelError, match=message) as caught:
        adapted(folder, **options)
    spec = Model(path=str(folder), lora=Lora(**{"r": 4, "alpha": 8, **options}))
    assert refusal(spec, tp=1) == str(caught.value), "check says the same"


def test_what_check_sees_of_a_saved_adapter(tmp_path: Path) -> None:
    folder, other = save_model(tmp_path / "base", "qwen2"), save_model(tmp_path / "other", "qwen3")
    model = adapted(folder, target_modules=["q_proj"])
    lora.write_adapter(tmp_path / "adapter", model.module, model.adapter())

    def said(base: Path, **options: Any) -> str | None:
        return refusal(Model(path=str(base), lora=Lora(adapter=str(tmp_path / "adapter"), **options)), tp=2)

    assert said(folder) is None
    assert "model.lora.dropout: 0.1 would be another mask" in str(said(folder, dropout=0.1))
    save_model(other, "qwen2", hidden_size=96)
    assert "q_proj.lora_A.weight of shape [4, 96] is not in adapter_model" in str(said(other))
