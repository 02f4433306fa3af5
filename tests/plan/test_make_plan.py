"""Heads against tp, memory, what `auto` becomes, and plan.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.plan import Plan, Site, make_plan, read_plan, resolve_recipe, write_plan
from hpc_rl.recipe import RecipeError, load_recipe

Make = Callable[..., Plan]
Folder = Callable[..., Path]

HEADS = {
    "num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 96, "num_hidden_layers": 4,
    "vocab_size": 100, "intermediate_size": 128,
}  # fmt: skip


def test_tp_must_divide_the_heads(plan: Make, model_folder: Folder) -> None:
    path = f"model.path={model_folder(**HEADS)}"
    plan(path, "rollout={replicas: 1, parallel: {tp: 4}}")  # key/value heads are replicated
    with pytest.raises(RecipeError) as caught:
        plan(path, "rollout={replicas: 1, parallel: {tp: 8}}")
    assert str(caught.value) == (
        "override 'rollout={replicas: 1, parallel: {tp: 8}}': rollout.parallel.tp: "
        "tp 8 does not divide the model's 12 attention heads; use one of [1, 2, 4, 6, 12]"
    )
    with pytest.raises(
        RecipeError, match=r"rollout.parallel.tp: tp 3 neither divides nor is a multiple of the model's 2"
    ):
        plan(path, "rollout={replicas: 1, parallel: {tp: 3}}")
    with pytest.raises(RecipeError, match=r"policy.parallel.tp: tp 4 does not divide .* use one of \[1, 2\]"):
        plan(path, "policy.parallel={dp_shard: 2, tp: 4}")


def test_a_mesh_that_the_trainer_cannot_do_is_refused(plan: Make) -> None:
    with pytest.raises(RecipeError) as caught:
        plan("policy.parallel={dp_shard: 1, tp: 2, pp: 2, cp: 2}", trainer="fsdp2")
    assert str(caught.value).splitlines() == [
        f"override 'policy.parallel={{dp_shard: 1, tp: 2, pp: 2, cp: 2}}': policy.parallel.{name}: is 2; "
        "trainer fsdp2 shards by dp_replicate, dp_shard and tp, keep 1"
        for name in ("pp", "cp")
    ]


def test_what_a_family_cannot_do_is_refused_before_the_queue(plan: Make, model_folder: Folder) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    path = f"model.path={model_folder(model_type='gpt_oss', **HEADS | heads)}"
    plan(path, trainer="fsdp2")
    with pytest.raises(RecipeError) as caught:
        plan(path, "policy.parallel={dp_shard: 4, tp: 2}", trainer="fsdp2")
    assert str(caught.value) == (
        "override 'policy.parallel={dp_shard: 4, tp: 2}': policy.parallel.tp: is 2; "
        "Transformers has no plan to split GPT-OSS models, keep 1 and use dp_shard"
    )
    path = f"model.path={model_folder(model_type='mllama', text_config=HEADS)}"
    plan(path, "rollout.engine=hf")
    with pytest.raises(RecipeError) as caught:
        plan(path)
    assert "rollout.engine: is 'vllm', which does not serve Llama 3.2 Vision models; use hf" in str(
        caught.value
    )


def test_nested_text_config_of_a_vision_model_counts(plan: Make, model_folder: Folder) -> None:
    path = f"model.path={model_folder(model_type='qwen2_5_vl', text_config=HEADS)}"
    with pytest.raises(RecipeError, match="12 attention heads"):
        plan(path, "rollout={replicas: 1, parallel: {tp: 8}}")


def test_an_unknown_family_is_a_warning(plan: Make, model_folder: Folder) -> None:
    made = plan(f"model.path={model_folder(**HEADS, **{'model_type': 'brandnew'})}")
    assert made.warnings == [
        "model type 'brandnew' is not in the catalog; only its heads are checked against tp"
    ]


def test_positions_end_somewhere(plan: Make, model_folder: Folder) -> None:
    path = f"model.path={model_folder(**HEADS, max_position_embeddings=2048)}"
    with pytest.raises(
        RecipeError, match=r"rollout.max_model_len: is 4096; the model's positions end at 2048"
    ):
        plan(path, "rollout.max_model_len=4096")
    for key in ("rollout.max_tokens", "eval.max_tokens"):
        with pytest.raises(RecipeError, match=rf"{key}: is 2048; .* end at 2048, prompt included$"):
            plan(path, f"{key}=2048")
        plan(path, f"{key}=2047")
    with pytest.raises(RecipeError, match=r"policy.max_length: is 2049; the model's positions end at 2048$"):
        plan(path, "policy.max_length=2049")
    plan(path, "policy.max_length=2048")


def test_a_warmup_that_never_ends_is_a_warning(plan: Make) -> None:
    (warning,) = plan("policy.steps=10", "policy.optimizer.warmup_steps=10").warnings
    assert warning.startswith(
        "override 'policy.optimizer.warmup_steps=10': policy.optimizer.warmup_steps 10 is not less than"
    )
    assert plan("policy.steps=11", "policy.optimizer.warmup_steps=10").warnings == []


def test_stale_samples_without_a_correction_are_a_warning(plan: Make) -> None:
    off = "algorithm={name: grpo, proximal: recompute, correction: {kind: none}, max_staleness: %d}"
    (warning,) = plan(off % 3).warnings
    assert (
        "algorithm.correction.kind none with algorithm.max_staleness 3: samples up to 3 versions" in warning
    )
    assert plan(off % 0).warnings == []


def test_a_mask_of_the_whole_row_is_a_warning(plan: Make) -> None:
    (warning,) = [
        text for text in plan("model.attn_implementation=sdpa", trainer="fsdp2").warnings if "mask" in text
    ]
    assert warning.startswith("override 'model.attn_implementation=sdpa': model.attn_implementation sdpa")
    for other in ("model.attn_implementation=null", "model.attn_implementation=flash_attention_2"):
        assert not any("mask" in text for text in plan(other, trainer="fsdp2").warnings)


def test_adapters_of_experts_without_checkpointing_are_a_warning(plan: Make) -> None:
    lora = "model.lora={target_parameters: [experts.down_proj]}"
    (warning,) = [text for text in plan(lora, trainer="fsdp2").warnings if "merged experts" in text]
    assert "set policy.activation_checkpointing to true" in warning
    kept = plan(lora, "policy.activation_checkpointing=true", trainer="fsdp2").warnings
    assert not any("merged experts" in text for text in kept)


@pytest.mark.parametrize("placement", ["het", "shared", "local"])
def test_too_little_time_to_work_is_a_warning_where_slurm_counts(plan: Make, placement: str) -> None:
    words = [f"cluster.placement={placement}", "policy.parallel.dp_shard=4", "rollout.replicas=4"]
    words += ["cluster.policy.gpus_per_node=0", "cluster.rollout.gpus_per_node=0"]
    short = [text for text in plan("cluster.time=00:09:00", *words).warnings if "requeued" in text]
    assert len(short) == (0 if placement == "local" else 1)
    assert all("leaves 240 s to work" in text and "cluster.time=00:09:00" in text for text in short)
    assert not any("requeued" in text for text in plan("cluster.time=00:10:00", *words).warnings)


def test_memory_is_what_the_headers_say(plan: Make, model_folder: Folder) -> None:
    folder = model_folder({"a": [1024, 1024], "b": [1024]}, **HEADS)
    made = plan(f"model.path={folder}", "policy.parallel.dp_shard=2")
    assert made.memory is not None
    parameters = 1024 * 1024 + 1024
    assert made.memory.parameters == parameters
    assert made.memory.weights_gb == made.memory.gradients_gb == round(4 * parameters / 2 / 2**30, 3)
    assert made.memory.optimizer_gb == round(8 * parameters / 2 / 2**30, 3)
    assert made.memory.gpu_gb == 80


def test_too_large_for_the_gpu_is_a_warning(plan: Make, model_folder: Folder) -> None:
    # 7.6 billion parameters by the config alone: 16 bytes each over 8 GPUs is 14.2 GiB
    big = {
        "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "num_hidden_layers": 28,
        "vocab_size": 152064, "intermediate_size": 18944, "tie_word_embeddings": False,
    }  # fmt: skip
    path = f"model.path={model_folder(**big)}"
    made = plan(path, gpus={"style": "gres", "per_node": 8, "memory_gb": 12})
    assert made.memory is not None
    assert made.memory.parameters == pytest.approx(7.6e9, rel=0.01)
    assert [warning.split(":")[0] for warning in made.warnings] == ["policy", "rollout"]
    assert "= 14.2 GiB per GPU, the site's GPUs have 12; raise policy.parallel.dp_shard" in made.warnings[0]
    assert plan(path, "rollout={replicas: 4, parallel: {tp: 2}}").warnings == []


def test_a_damaged_weights_file_is_one_clear_error(plan: Make, model_folder: Folder) -> None:
    folder = model_folder(**HEADS)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(RecipeError, match=r"model.path: .*model.safetensors is not a safetensors file"):
        plan(f"model.path={folder}")


def test_auto_is_settled(tmp_path: Path) -> None:
    loaded = load_recipe("gsm8k-grpo")
    gpus = Site(name="g", gpus={"style": "gres", "per_node": 8}, paths={"output_root": str(tmp_path)})  # type: ignore[arg-type]
    cpus = Site(name="c")
    on_gpu = resolve_recipe(loaded, gpus, make_plan(loaded, gpus))
    on_cpu = resolve_recipe(loaded, cpus, make_plan(loaded, cpus))
    assert on_gpu.rollout is not None
    assert on_cpu.rollout is not None
    assert (on_gpu.rollout.weights.transport, on_cpu.rollout.weights.transport) == ("nccl", "gloo")
    assert (on_gpu.rollout.engine, on_gpu.cluster.site, on_gpu.cluster.placement) == ("vllm", "g", "het")
    assert on_gpu.output_root == str(tmp_path)
    assert on_cpu.output_root == str(Path.cwd() / "runs")
    chosen = load_recipe("gsm8k-grpo", ["output_root=/elsewhere"])
    assert resolve_recipe(chosen, gpus, make_plan(chosen, gpus)).output_root == "/elsewhere"
    assert loaded.recipe.rollout is not None
    assert loaded.recipe.rollout.weights.transport == "auto"  # the loaded recipe stays as it was


def test_plan_reads_back(plan: Make, tmp_path: Path) -> None:
    made = plan()
    write_plan(made, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == made
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"plan.json is not a plan"):
        read_plan(tmp_path / "plan.json")
