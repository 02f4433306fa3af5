"""The shipped recipes: each loads, plans and renders; their headers say what is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hpc_rl.cli._prepare import prepare
from hpc_rl.cli._start import script_text
from hpc_rl.plan import Plan
from hpc_rl.plan.memory import estimate
from hpc_rl.recipe import load_recipe
from hpc_rl.recipe.cosmos.data import SCRIPTS
from hpc_rl.recipe.share import share_dir

FOLDER = share_dir("recipes")
FILES = sorted(FOLDER.glob("*.yaml"))

# recipe -> billions of parameters of each part of the model (by its safetensors), GPUs
SFT: dict[str, tuple[dict[str, float], int]] = {
    "mistral-7b-fsdp4-sft": ({"model": 7.248}, 4),
    "gemma3-12b-vlm-fsdp4-sft": ({"model": 12.187}, 4),
    "phi4-14b-fsdp4-sft": ({"model": 14.660}, 4),
    "gpt-oss-20b-sft": ({"model": 20.915}, 8),
    "llama3.2-11b-vision-sft": ({"model": 10.671}, 4),
    "llava-1.5-7b-sft": ({"language_model": 6.760, "vision_tower": 0.303}, 2),
    "cosmos-reason1-7b-fsdp2-sft": ({"model": 8.292}, 2),
    "cosmos-reason2-llava-sft": ({"model": 8.767}, 4),
    "gsm8k-sft": ({"model": 1.544}, 8),
}
DPO: dict[str, tuple[dict[str, float], int]] = {"qwen2.5-7b-dpo": ({"model": 7.616}, 4)}
SUPERVISED = SFT | DPO
# recipe -> billions of parameters, GPUs of the policy, GPUs of the rollouts
RL: dict[str, tuple[float, int, int]] = {
    "phi4-14b-p-fsdp4-r-tp2-grpo": (14.660, 4, 2),
    "mistral-7b-grpo": (7.248, 4, 2),
    "gpt-oss-20b-grpo": (20.915, 8, 4),
    "qwen2.5-7b-dapo-math": (7.616, 8, 8),
}
# The profile says nothing of memory, and a separate controller has some: Slurm would hand that on.
SITE_NEEDS = {"gsm8k-grpo-7b": ["cluster.policy.mem=0", "cluster.rollout.mem=0"]}
HUB_IDS = {
    "mistralai/Mistral-7B-Instruct-v0.3", "google/gemma-3-12b-it", "microsoft/phi-4", "openai/gpt-oss-20b",
    "meta-llama/Llama-3.2-11B-Vision-Instruct", "llava-hf/llava-1.5-7b-hf", "nvidia/Cosmos-Reason1-7B",
    "nvidia/Cosmos-Reason2-8B", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct",
}  # fmt: skip


def header(name: str) -> str:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    return "\n".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def plan_of(name: str, *overrides: str) -> Plan:
    return prepare(name, overrides, site="generic-gpu").plan


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_plans_and_renders_without_a_warning(file: Path) -> None:
    prepared = prepare(file.stem, SITE_NEEDS.get(file.stem, []), site="generic-gpu")
    assert prepared.recipe.name == file.stem
    assert prepared.plan.warnings == []
    script = script_text(prepared, Path("/runs/one"))
    groups = prepared.plan.groups
    together = prepared.plan.placement == "shared"
    gpus = [sum(g.gpus_per_node for g in groups)] if together else [g.gpus_per_node for g in groups]
    assert [int(n) for n in re.findall(r"--gres=gpu:(\d+)\n", script)] == [n for n in gpus if n]
    assert f"#SBATCH --nodes={prepared.plan.group('policy').nodes}\n" in script


def test_the_list_is_whole() -> None:
    """Every recipe for SFT is in the table of this test and in that of the README, with real models."""
    found = {file.stem: load_recipe(file).recipe for file in FILES}
    kinds = {kind: {name for name in found if found[name].kind == kind} for kind in ("sft", "preference")}
    assert kinds == {"sft": set(SFT), "preference": set(DPO)}
    assert {found[name].model.path for name in SUPERVISED} == HUB_IDS
    page = (FOLDER / "README.md").read_text()
    for name in found:
        assert f"`{name}`" in page


@pytest.mark.parametrize("name", SUPERVISED)
def test_the_gpus_and_the_memory_are_what_header_and_readme_say(name: str) -> None:
    parts, gpus = SUPERVISED[name]
    plan = plan_of(name)
    assert plan.mesh.world_size == plan.group("policy").gpus_per_node == gpus
    shapes = {f"{part}.weight": [round(billions * 1e9)] for part, billions in parts.items()}
    total = sum(shape[0] for shape in shapes.values())
    memory = estimate(load_recipe(name).recipe, total, plan.mesh, 80, shapes)
    assert memory.total_gb < 0.85 * 80  # room for activations
    row = next(line for line in (FOLDER / "README.md").read_text().splitlines() if f"`{name}`" in line)
    assert row.endswith(f"| {gpus} | {memory.total_gb:.0f} |")
    if name != "gsm8k-sft":
        assert f"{gpus} GPUs of 80 GB" in header(name)
        assert f"({memory.total_gb:.0f} GiB" in header(name) or f"take {memory.total_gb:.0f} GiB" in header(
            name
        )


@pytest.mark.parametrize("name", RL)
def test_the_gpus_of_rl_are_what_header_and_readme_say(name: str) -> None:
    billions, policy, rollout = RL[name]
    plan = plan_of(name)
    groups = {group.role: group for group in plan.groups}
    assert (groups["policy"].gpus_per_node, groups["rollout"].gpus_per_node) == (policy, rollout)
    shapes = {"model.weight": [round(billions * 1e9)]}
    memory = estimate(load_recipe(name).recipe, shapes["model.weight"][0], plan.mesh, 80, shapes)
    assert memory.total_gb < 0.85 * 80
    row = next(line for line in (FOLDER / "README.md").read_text().splitlines() if f"`{name}`" in line)
    assert row.endswith(f"| {policy} | {memory.total_gb:.0f} | {rollout} |")
    assert f"the policy on {policy} GPUs of 80 GB ({memory.total_gb:.0f} GiB of fp32 state" in " ".join(
        header(name).split()
    )


@pytest.mark.parametrize("name", [*RL, *(name for name in SUPERVISED if name != "gsm8k-sft")])
def test_the_commands_of_the_header_work(name: str) -> None:
    """fetch, check and submit are there, with overrides that load."""
    commands = [
        shlex.split(line, comments=True) for line in header(name).splitlines() if line.startswith("hpc-rl ")
    ]
    assert [words[1] for words in commands] == ["fetch", "check", "submit"]
    for words in commands:
        assert words[2] == name
        load_recipe(name, [word for word in words[3:] if not word.startswith("--")])
    assert "Data: " in header(name)


@pytest.mark.parametrize(
    ("name", "overrides", "nodes", "gpus"),
    [
        ("cosmos-reason2-llava-sft", [], 1, 4),
        ("cosmos-reason2-llava-sft", ["policy.parallel.dp_shard=8"], 1, 8),
        ("cosmos-reason2-llava-sft", ["policy.parallel.dp_shard=16", "cluster.policy.nodes=2"], 2, 8),
        ("cosmos-reason1-7b-fsdp2-sft", ["policy.parallel.dp_shard=4"], 1, 4),
        ("llava-1.5-7b-sft", ["policy.parallel.dp_shard=4"], 1, 4),
    ],
)
def test_more_gpus_are_one_override(name: str, overrides: list[str], nodes: int, gpus: int) -> None:
    group = plan_of(name, *overrides).group("policy")
    assert (group.nodes, group.gpus_per_node, group.tasks) == (nodes, gpus, nodes * gpus)
    assert load_recipe(name, overrides).recipe.policy.batch_size == load_recipe(name).recipe.policy.batch_size


def test_what_the_families_need() -> None:
    """Mistral's and Gemma's templates refuse what `repair` mends; clips are read as cosmos-rl read them."""
    for name in ("mistral-7b-fsdp4-sft", "gemma3-12b-vlm-fsdp4-sft"):
        assert {"merge_roles", "move_system"} <= set(load_recipe(name).recipe.data.train.repair)
    clips = load_recipe("cosmos-reason1-7b-fsdp2-sft").recipe.data.train
    script = SCRIPTS["cosmos_sft.py"]
    assert (clips.format, clips.fps, clips.max_pixels) == (
        script.format,
        script.keys["fps"],
        script.keys["max_pixels"],
    )
    assert load_recipe("cosmos-reason2-llava-sft").recipe.data.train.format == "llava"


def test_patterns_are_regular_expressions_that_match_what_they_mean() -> None:
    freeze = {name: load_recipe(name).recipe.model.freeze for name in SFT}
    assert {name for name, patterns in freeze.items() if patterns} == {"gpt-oss-20b-sft", "llava-1.5-7b-sft"}
    assert re.search(freeze["gpt-oss-20b-sft"][0], "model.layers.3.mlp.router.weight")
    assert not re.search(freeze["gpt-oss-20b-sft"][0], "model.layers.3.mlp.experts.gate_up_proj")
    assert re.search(freeze["llava-1.5-7b-sft"][0], "model.vision_tower.encoder.layers.0.mlp.fc1.weight")
    assert not re.search(freeze["llava-1.5-7b-sft"][0], "model.multi_modal_projector.linear_1.weight")
