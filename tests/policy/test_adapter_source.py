"""The push of an adapter alone: it stands for the merged weights, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_rl.models.base import ModelError, ParallelSpec
from hpc_rl.models.hf.adapted import AdaptedModel
from hpc_rl.models.hf.lora import merge
from hpc_rl.models.hf.model import build
from hpc_rl.policy.adapter_source import AdapterSource
from hpc_rl.recipe.schema import Lora, Model
from hpc_rl.weights.adapter import META, factor_names, read_adapter
from hpc_rl.weights.protocol import WeightTransferError
from tests.models.test_lora import stir
from tests.ranks import run_ranks
from tests.tiny_models import save_model

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
CPU = torch.device("cpu")
PATTERNS = {"r_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}}


def adapted(folder: Path | str, parallel: ParallelSpec, **lora: object) -> AdaptedModel:
    spec = Model(path=str(folder), dtype="float32", lora=Lora.model_validate({"r": 4, "alpha": 6.0, **lora}))
    model = build(spec, parallel, seed=5)
    assert isinstance(model, AdaptedModel)
    stir(model)
    return model


def tensors_of(model: AdaptedModel) -> dict[str, torch.Tensor]:
    return dict(entry for bucket in AdapterSource(model).buckets(1 << 14) for entry in bucket)


def check_sharded(rank: int, world_size: int, folder: str) -> None:
    parallel = ParallelSpec(CPU, torch.float32, dp_shard=world_size)
    expected = tensors_of(adapted(folder, ParallelSpec(CPU, torch.float32), **PATTERNS))
    found = tensors_of(adapted(folder, parallel, **PATTERNS))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_it_stands_for_the_merged_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "qwen2")
    model = adapted(folder, ParallelSpec(CPU, torch.float32), **PATTERNS)
    base = dict(
        build(
            Model(path=str(folder), dtype="float32"), ParallelSpec(CPU, torch.float32)
        ).module.named_parameters()
    )
    tensors = tensors_of(model)
    layers = read_adapter(tensors, model.fingerprint.hex())
    assert layers["model.layers.0.self_attn.q_proj"].a.shape[0] == 2
    assert {factors.scale for factors in layers.values()} == {6 / 4, 3 / 2}
    merged = dict(entry for bucket in model.buckets(1 << 20) for entry in bucket)
    for layer, factors in layers.items():
        weight = base.pop(f"{layer}.weight")
        changed = merge(weight, factors.a, factors.b, factors.scale)
        assert torch.equal(changed, merged[f"{layer}.weight"]), layer
        assert not torch.equal(changed, weight), layer
    for name, weight in base.items():  # and all else is as the engine loaded it
        assert torch.equal(weight, merged[name]), name
    run_ranks(check_sharded, 2, tmp_path, str(folder))


def test_what_is_trained_besides_cannot_be_sent(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "llama")
    options = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    with pytest.raises(ModelError, match=r"lm_head.* is trained and no part of an adapter of linear layers"):
        AdapterSource(adapted(folder, ParallelSpec(CPU, torch.float32), **options))


def test_a_push_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = adapted(
        save_model(tmp_path, "qwen2"), ParallelSpec(CPU, torch.float32), target_modules=["q_proj"]
    )
    tensors, base = tensors_of(model), model.fingerprint.hex()
    a, b = factor_names("model.layers.1.self_attn.q_proj")
    with pytest.raises(WeightTransferError, match="not those the policy trains over"):
        read_adapter(tensors, "00" * 16)
    with pytest.raises(WeightTransferError, match="holds whole weights and this engine waits for an adapter"):
        read_adapter({name: tensor for name, tensor in tensors.items() if name != META}, base)
    with pytest.raises(WeightTransferError, match=f"lacks, or has besides its layers: {b}"):
        read_adapter({name: tensor for name, tensor in tensors.items() if name != b}, base)
    with pytest.raises(WeightTransferError, match=r"factors of .* have shapes \[4, 128\], \[128, 3\]"):
        read_adapter({**tensors, b: tensors[b][:, :3]}, base)
    assert a in tensors
