"""LoRA over tensor-parallel ranks, and these inside FSDP, against one process.

Tolerances, fixed before any result was seen: losses, merged weights and adapters after five steps 1e-5;
gradients as in `contract`; what is only moved, nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hpc_rl.checkpoint.export import Export, Exporter
from hpc_rl.models.base import ModelError, ParallelSpec
from hpc_rl.models.hf import lora
from hpc_rl.models.hf.adapted import AdaptedModel, adapter_export
from hpc_rl.recipe.schema import Lora
from tests.models import contract as c
from tests.models.test_lora import stir
from tests.ranks import run_ranks

pytestmark = pytest.mark.torch
torch.set_num_threads(1)

# By columns and by rows, with biases; a head that is saved whole; one layer without an adapter beside one
# with; a plan that gathers the columns; norms between the two.
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {"modules_to_save": ["lm_head"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "phi3": {"target_modules": ["qkv_proj", "o_proj", "down_proj", "lm_head"]},
    "qwen3_moe": {"use_rslora": True},
}


def adapted(family: str, folder: str, spec: ParallelSpec) -> AdaptedModel:
    model = c.build_model(folder, spec, lora=Lora(**{"r": 4, "alpha": 8, **CASES[family]}))
    assert isinstance(model, AdaptedModel)
    stir(model)
    return model


def merged(model: AdaptedModel) -> dict[str, Tensor]:
    return {name: value.clone() for bucket in model.buckets(150_000) for name, value in bucket}


def run(
    model: AdaptedModel, rows: list[c.Row], probe: c.Row, tokens: int, spec: ParallelSpec
) -> dict[str, Any]:
    with torch.no_grad():  # Transformers splits otherwise where no gradient is asked for
        loss = float(c.loss_of(model, probe, 1))
    before = {"adapter": model.adapter(), "merged": merged(model)}
    history = c.train(model, "sgd", rows, tokens, spec)
    after = {"adapter": model.adapter(), "merged": merged(model)}
    return {"probe": loss, "before": before, "history": vars(history), "after": after}


def compare(found: dict[str, Any], expected: dict[str, Any], label: str) -> None:
    assert abs(found["probe"] - expected["probe"]) <= c.TOLERANCE * max(1.0, expected["probe"]), label
    for name, value in expected["before"]["adapter"].items():
        assert torch.equal(found["before"]["adapter"][name], value), f"{label}: {name} begins elsewhere"
    for when in ("before", "after"):
        for what in ("adapter", "merged"):
            ours, theirs = found[when][what], expected[when][what]
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                off = float((ours[name] - value).abs().max())
                assert off <= c.TOLERANCE, f"{label}: {what} {name} is off by {off:.3g} {when} training"
    ours, theirs = found["history"], expected["history"]
    for key in ("losses", "norms"):
        for step, (a, b) in enumerate(zip(ours[key], theirs[key], strict=True)):
            assert abs(a - b) <= c.TOLERANCE * max(1.0, b), f"{label}: {key}[{step}] is {a}, not {b}"
    assert ours["first"].keys() == theirs["first"].keys()
    for name, gradient in theirs["first"].items():
        c.same_gradient(f"{label} {name}", ours["first"][name], gradient)


def check_split(rank: int, _: int, folders: dict[str, str], scratch: str) -> None:
    """Ranks 0 and 1 are TP x 2 with every other family, 2 and 3 with the rest; then all are 2 x 2."""
    for number, (family, folder) in enumerate(folders.items()):
        base, half = Path(scratch) / family, rank // 2
        rows, expected = torch.load(base / "expected.pt", weights_only=False)
        if number % 2 == half:
            with c.world(base, "store2", rank % 2, 2):
                model = adapted(family, folder, c.TP2)
                compare(run(model, rows, rows[0], c.tokens_of(rows), c.TP2), expected, f"{family} tp")
    base = Path(scratch) / "llama"
    rows, expected = torch.load(base / "expected.pt", weights_only=False)
    spec = ParallelSpec(c.CPU, torch.float32, dp_shard=2, tp=2, activation_checkpointing=True)
    with c.world(base, "store4", rank, 4):
        model = adapted("llama", folders["llama"], spec)
        compare(run(model, rows[rank // 2 :: 2], rows[0], c.tokens_of(rows), spec), expected, "llama 2 x 2")
        export(model, rank, base / "out", expected["after"])


def export(model: AdaptedModel, rank: int, target: Path, expected: dict[str, Any]) -> None:
    """Each rank writes what it has; the files are those of one process."""
    exporter = Exporter(rank, 4, "1.1", 60.0)
    source, also = adapter_export(model, Lora(r=4, alpha=8))
    exporter.stage(source, Export(target, model.folder, None, torch.float32, also)).join(60.0)
    exporter.close()
    if rank == 0:
        found = load_file(target / "model.safetensors"), load_file(target / "adapter" / lora.WEIGHTS)
        for tensors, what in zip(found, ("merged", "adapter"), strict=True):
            assert tensors.keys() == expected[what].keys()
            for name, value in expected[what].items():
                assert float((tensors[name] - value).abs().max()) <= c.TOLERANCE, f"exported {name}"


@pytest.mark.slow
def test_tensor_parallel_adapters_equal_one_process(tmp_path: Path) -> None:
    """Losses of five steps, gradients of the first, merged weights and adapter files before and after."""
    folders = {}
    for family in CASES:
        folders[family] = str(c.save(tmp_path / "models" / family, family))
        rows = c.rows_of(family)[:2]
        expected = run(adapted(family, folders[family], c.ONE), rows, rows[0], c.tokens_of(rows), c.ONE)
        assert expected["history"]["losses"][-1] < expected["history"]["losses"][0] - 0.01
        (tmp_path / family).mkdir()
        torch.save((rows, expected), tmp_path / family / "expected.pt")
    run_ranks(check_split, 4, tmp_path, folders, str(tmp_path), group=False)


def test_dropout_is_refused(tmp_path: Path) -> None:
    folder = c.save(tmp_path, "qwen2")
    with pytest.raises(ModelError, match=r"model\.lora\.dropout: 0\.1 would be another mask on each rank"):
        c.build_model(folder, c.TP2, lora=Lora(dropout=0.1))
