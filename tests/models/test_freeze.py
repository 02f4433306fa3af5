"""`model.train` and `model.freeze`: what is trained, and what is said of patterns that fit none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_rl.models.base import ModelError
from tests.models import contract as c

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def trained(folder: Path, **options: list[str]) -> set[str]:
    module = c.build_model(folder, **options).module
    return {name for name, p in module.named_parameters() if p.requires_grad}


def test_patterns_choose_what_is_trained(tmp_path: Path) -> None:
    folder = c.save(tmp_path, "llava")
    everything = trained(folder)
    assert trained(folder, freeze=["vision_tower"]) == {n for n in everything if "vision_tower" not in n}
    assert trained(folder, train=["multi_modal_projector", r"layers\.1\.mlp"], freeze=["bias"]) == {
        n for n in everything if ("multi_modal_projector" in n or "layers.1.mlp" in n) and "bias" not in n
    }


def test_frozen_parameters_get_no_gradient_and_stay(tmp_path: Path) -> None:
    folder = c.save(tmp_path, "llava")
    model = c.build_model(folder, freeze=["vision_tower", "embed_tokens"])
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    rows = c.rows_of("llava")[:2]
    c.train(model, "adamw", rows, c.tokens_of(rows), c.ONE)
    for name, parameter in model.module.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == ("vision_tower" not in name and "embed_tokens" not in name), name


def test_a_tied_weight_goes_by_its_first_name(tmp_path: Path) -> None:
    folder = c.save(tmp_path, "qwen2")
    assert "model.embed_tokens.weight" not in trained(folder, freeze=["embed_tokens"])
    with pytest.raises(ModelError, match=r"model.freeze\[0\] 'lm_head' matches no parameter"):
        trained(folder, freeze=["lm_head"])


def test_patterns_that_fit_nothing_name_what_is_near(tmp_path: Path) -> None:
    folder = c.save(tmp_path, "llava")
    with pytest.raises(ModelError, match=r"model.freeze\[1\] 'vison_tower' .*near it:.* vision_tower"):
        trained(folder, freeze=["embed_tokens", "vison_tower"])
    with pytest.raises(ModelError, match=r"model.train\[0\] '\*' is not a regular expression"):
        trained(folder, train=["*"])
    with pytest.raises(ModelError, match="leave nothing to train"):
        trained(folder, train=["lm_head"], freeze=["."])
