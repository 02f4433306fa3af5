"""Runs that train a part of the model: LoRA, frozen patterns, averages; through checkpoints and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

from hpc_rl.bus.messages import TrainStep
from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.checkpoint.loader import CheckpointError, tensors_of
from hpc_rl.checkpoint.offline import export_checkpoint
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.recipe.schema import Recipe
from tests.tiny_models import save_model
from tests.training import make_context, make_plan, make_recipe, make_run

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
LORA = {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "dropout": 0.1}}
WHOLE = {"lora": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]}}
EXPERTS = {"lora": {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}}
FREEZE = {"freeze": [r"\.mlp\.", "embed_tokens"]}


def partial(folder: Path, model: Path, changes: dict[str, Any], **policy: Any) -> Recipe:
    recipe = make_recipe(folder, model, **policy)
    data = recipe.model_dump(mode="json")
    data["model"] |= changes
    return Recipe.model_validate(data)


def steps(trainer: Fsdp2Trainer, first: int, last: int) -> list[float]:
    return [trainer.train_step(TrainStep(step))["train/loss"] for step in range(first, last + 1)]


def exported(trainer: Fsdp2Trainer, folder: Path) -> dict[str, torch.Tensor]:
    trainer.export(trainer.step, folder.name, folder)
    (result,) = list(trainer.finish())
    assert result.error == ""
    return load_file(folder / "model.safetensors")


def with_experts(tiny_model: Path, folder: Path) -> Path:
    """A tiny mixture of experts with the tokenizer of `tiny_model`."""
    vocabulary = T.AutoConfig.from_pretrained(tiny_model).vocab_size
    found = save_model(folder / "moe", "qwen3_moe", vocab_size=vocabulary)
    T.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(found)
    return found


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        (LORA, {}),
        (WHOLE, {"ema": {"decay": 0.9}}),
        (EXPERTS, {}),
        (FREEZE, {"ema": {"decay": 0.5}}),
        ({}, {"ema": {"decay": 0.5}}),
    ],
)
def test_it_resumes_bit_equal_and_exports_the_same_from_disk(
    changes: dict[str, Any], policy: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    if changes is EXPERTS:
        tiny_model = with_experts(tiny_model, tmp_path)
    recipe = partial(tmp_path, tiny_model, changes, **policy)
    run = make_run(tmp_path / "run", recipe, make_plan(recipe))
    first = Fsdp2Trainer(make_context(run, recipe))
    first.load()
    losses = steps(first, 1, 3)
    first.stage_checkpoint(3, run.checkpoint(3) / "policy", sync=True)
    assert [r.error for r in first.poll()] == [""]
    write_complete(run.checkpoint(3))
    live = exported(first, tmp_path / "live")
    losses += steps(first, 4, 6)
    end = exported(first, tmp_path / "end")
    first.close()
    assert any(not torch.equal(end[name], live[name]) for name in end)

    base = load_file(tiny_model / "model.safetensors")
    trained = {name for name in end if not torch.equal(end[name], base[name])}
    names = tensors_of(run.checkpoint(3) / "policy")
    if "freeze" in changes:
        assert trained == {n for n in base if ".mlp." not in n and "embed_tokens" not in n}
    if changes:
        kept = {name.removeprefix("model.") for name in names if name.startswith("model.")}
        assert not kept & (set(base) - trained), "frozen weights are in the checkpoint"
        assert "frozen" in names

    torch.manual_seed(999)
    second = Fsdp2Trainer(make_context(run, recipe, attempt=2))
    assert second.load() == 3
    assert losses[3:] == steps(second, 4, 6)
    again = exported(second, tmp_path / "again")
    second.close()
    assert all(torch.equal(again[name], end[name]) for name in end)

    offline = load_file(export_checkpoint(run, 3, tmp_path / "offline") / "model.safetensors")
    assert offline.keys() == live.keys()
    for name, value in live.items():
        assert torch.equal(offline[name], value), name


def test_other_frozen_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    recipe = partial(tmp_path, tiny_model, FREEZE)
    run = make_run(tmp_path / "run", recipe, make_plan(recipe))
    trainer = Fsdp2Trainer(make_context(run, recipe))
    trainer.load()
    steps(trainer, 1, 1)
    trainer.stage_checkpoint(1, run.checkpoint(1) / "policy", sync=True)
    list(trainer.poll())
    write_complete(run.checkpoint(1))
    trainer.close()
    file = tiny_model / "model.safetensors"
    original = file.read_bytes()
    try:
        tensors = load_file(file)
        save_file({name: value + 1 for name, value in tensors.items()}, file, metadata={"format": "pt"})
        other = Fsdp2Trainer(make_context(run, recipe, attempt=2))
        try:
            with pytest.raises(CheckpointError, match="frozen weights of other files"):
                other.load()
        finally:
            other.close()
    finally:
        file.write_bytes(original)
