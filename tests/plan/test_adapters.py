"""What `rollout.weights.lora` becomes, from the recipe and the headers of the model's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.plan import Plan, Site, resolve_recipe
from hpc_rl.plan.adapters import adapter_settings
from hpc_rl.recipe import RecipeError, load_recipe
from hpc_rl.recipe.schema import Lora

Make = Callable[..., Plan]
Folder = Callable[..., Path]
SHAPES = {"model.embed_tokens.weight": [100, 96], "model.norm.weight": [96]}
LORA = "model.lora={r: 8, target_modules: [q_proj]}"
FP32 = "model.dtype=float32"


@pytest.mark.parametrize(
    ("overrides", "config", "reason"),
    [
        ([FP32], {}, None),
        ([FP32, "rollout.engine=hf"], {"model_type": "qwen2_5_vl"}, None),
        ([FP32], {"model_type": "qwen2_5_vl"}, "vLLM's adapters are not proven for Qwen2-VL models"),
        ([FP32], {"model_type": "qwen3_moe"}, "vLLM's adapters are not proven for Qwen3-MoE models"),
        ([FP32], {"model_type": "brandnew"}, "vLLM's adapters are not proven for brandnew models"),
        ([FP32, "model.lora.modules_to_save=[lm_head]"], {}, "modules_to_save are trained whole"),
        (
            [FP32, "model.lora.r_pattern={k_proj: 600}"],
            {},
            "vLLM takes ranks up to 512, this adapter has 600",
        ),
        (
            [FP32, "rollout={replicas: 1, parallel: {tp: 1, pp: 2}}"],
            {},
            "vLLM's adapters with rollout.parallel.pp above 1",
        ),
        ([], {}, "the model's files hold F32, which an engine in bfloat16 rounds before"),
    ],
)
def test_auto_is_the_adapter_where_it_is_the_same(
    overrides: list[str], config: dict[str, Any], reason: str | None, plan: Make, model_folder: Folder
) -> None:
    path = f"model.path={model_folder(SHAPES, **config)}"
    made = plan(path, LORA, *overrides, trainer="fsdp2")
    if reason is None:
        assert made.notes == ["pushes to the rollouts hold the adapter alone"]
    else:
        assert made.notes[0].startswith(f"pushes to the rollouts hold whole merged weights: {reason}")
    assert made.lora_sync == ("adapter" if reason is None else "merged")
    loaded = load_recipe("gsm8k-grpo", ["policy.trainer=fsdp2", path, LORA, *overrides])
    settled = resolve_recipe(loaded, Site(name="c"), made)
    assert settled.rollout is not None
    assert settled.rollout.weights.lora == made.lora_sync


def test_the_recipe_has_the_last_word_where_both_are_right(plan: Make, model_folder: Folder) -> None:
    known, unknown = (f"model.path={model_folder(SHAPES)}", "model.path=someone/elsewhere")
    merged, adapter = "rollout.weights.lora=merged", "rollout.weights.lora=adapter"
    assert plan(known, LORA, FP32, merged, trainer="fsdp2").lora_sync == "merged"
    assert plan(unknown, LORA, FP32, trainer="fsdp2").lora_sync == "merged"
    assert plan(unknown, LORA, FP32, adapter, trainer="fsdp2").lora_sync == "adapter"
    with pytest.raises(RecipeError) as caught:
        plan(known, LORA, adapter, FP32, "model.lora.modules_to_save=[lm_head]", trainer="fsdp2")
    assert str(caught.value) == (
        "override 'rollout.weights.lora=adapter': rollout.weights.lora: is 'adapter', but "
        "modules_to_save are trained whole, which is more than an adapter; use merged"
    )
    with pytest.raises(RecipeError, match=r"is 'adapter'; there is none without model\.lora"):
        plan(known, FP32, adapter, trainer="fsdp2")
    assert plan(known, FP32, trainer="fsdp2").notes == []  # nothing to say without adapters


def test_the_settings_of_a_saved_adapter_count(tmp_path: Path) -> None:
    saved = {"r": 4, "rank_pattern": {"q_proj": 32}, "modules_to_save": None, "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    settings = adapter_settings(Lora(r=64, adapter=str(tmp_path)))
    assert (settings["rank"], settings["modules_to_save"], settings["use_dora"]) == (32, [], True)
