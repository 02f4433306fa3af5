"""Exports: tensor for tensor what save_pretrained writes, from the live model and from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors.torch import load_file

from hpc_rl.bus.messages import ModelExported, TrainStep
from hpc_rl.checkpoint import export as module
from hpc_rl.checkpoint.export import ExportError
from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.checkpoint.offline import export_checkpoint
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from tests.tiny_models import save_model, save_tokenizer
from tests.training import make_context, make_plan, make_recipe, make_run

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize(("family", "shard_bytes"), [("qwen2", 1 << 40), ("qwen3_moe", 300_000)])
def test_live_and_offline_exports_equal_save_pretrained(
    family: str, shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", shard_bytes)
    folder = save_tokenizer(save_model(tmp_path / "model", family))
    recipe = make_recipe(tmp_path, folder, steps=2)
    run = make_run(tmp_path, recipe, make_plan(recipe))
    trainer = Fsdp2Trainer(make_context(run, recipe))
    trainer.load()
    trainer.train_step(TrainStep(1))
    trainer.model.module.save_pretrained(tmp_path / "expected")
    trainer.stage_checkpoint(1, run.checkpoint(1) / "policy", sync=False)
    trainer.export(1, "final", run.safetensors / "final")
    trainer.train_step(TrainStep(2))  # goes on at once and must not leak into what is being written
    exported = [message for message in trainer.finish() if isinstance(message, ModelExported)]
    trainer.close()
    write_complete(run.checkpoint(1))
    assert [(m.step, m.label, m.error) for m in exported] == [(1, "final", "")]
    live = Path(exported[0].path)
    offline = export_checkpoint(run, None, tmp_path / "offline")

    expected = tensors(tmp_path / "expected")
    for result in (live, offline):
        found = tensors(result)
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        parts = sorted(path.name for path in result.glob("*.safetensors"))
        if shard_bytes > 1 << 30:
            assert parts == ["model.safetensors"]
        else:
            index = json.loads((result / "model.safetensors.index.json").read_text())
            assert len(parts) > 2
            assert set(index["weight_map"].values()) == set(parts)
            assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        loaded = T.AutoModelForCausalLM.from_pretrained(result)
        reference = T.AutoModelForCausalLM.from_pretrained(tmp_path / "expected")
        ids = torch.arange(2, 20)[None]
        assert torch.equal(loaded(input_ids=ids).logits, reference(input_ids=ids).logits)
        assert T.AutoTokenizer.from_pretrained(result)("a+b").input_ids == [67, 13, 68]
        assert not list(result.parent.glob(".*partial"))


def test_exports_that_cannot_be_are_errors(tmp_path: Path) -> None:
    folder = save_tokenizer(save_model(tmp_path / "model"))
    recipe = make_recipe(tmp_path, folder)
    run = make_run(tmp_path, recipe, make_plan(recipe))
    with pytest.raises(ExportError, match="complete steps: none"):
        export_checkpoint(run, 3, tmp_path / "out")
    trainer = Fsdp2Trainer(make_context(run, recipe))
    trainer.load()
    (tmp_path / "file").write_text("a file where the parent folder should be")
    trainer.export(0, "x", tmp_path / "file" / "x")
    (failed,) = [message for message in trainer.finish() if isinstance(message, ModelExported)]
    assert "NotADirectoryError" in failed.error
    trainer.close()
