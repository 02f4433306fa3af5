"""The job scripts that are kept as golden files: one recipe and one site profile each.

`python tests/slurm/slurm_cases.py --update-golden` writes them anew; read the difference first.
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hpc_rl.cluster.devcluster import PartitionSpec, ProfileSpec
from hpc_rl.cluster.environment import role_environment
from hpc_rl.cluster.slurm.script import JobScript
from hpc_rl.cluster.slurm.steps import role_python, step_argv
from hpc_rl.plan import Plan, Site, make_plan, resolve_recipe
from hpc_rl.recipe.load import load_recipe
from hpc_rl.recipe.schema import Recipe
from hpc_rl.supervisor.launchers import MODULES

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = Path(__file__).parent / "templates"
RUN_DIR = Path("/scratch/runs/demo/20260101-120000-ab12")
FOLDER = RUN_DIR / "submitit"
LOG = RUN_DIR / "logs/job.log"
PYTHON = "/opt/hpc-rl/bin/python"

# 13 nodes: what the largest golden job asks for, so that Slurm itself can judge the scripts.
CLUSTER = ProfileSpec(
    partitions=(
        PartitionSpec(
            "gpu", nodes=8, cpus=64, memory_mb=512_000, gpus=8, features=("a100", "ib"), default=True
        ),
        PartitionSpec("gpu-small", nodes=4, cpus=64, memory_mb=256_000, gpus=8, features=("l40",)),
        PartitionSpec("cpu", nodes=1, cpus=16, memory_mb=64_000, features=("big",)),
    ),
    roles={"policy": "gpu", "rollout": "gpu-small", "controller": "cpu"},
)

_RL: dict[str, Any] = {
    "name": "demo",
    "kind": "rl",
    "model": {"path": "example/model"},
    "data": {"train": {"path": "example/data"}},
    "algorithm": {"name": "grpo", "group_size": 8},
    "reward": [{"name": "exact"}],
    "policy": {"parallel": {"dp_shard": 8}, "steps": 10},
    "rollout": {"replicas": 4, "parallel": {"tp": 2}},
    "cluster": {"time": "08:00:00", "secrets": ["WANDB_API_KEY"]},
}
_SITE: dict[str, Any] = {
    "name": "center",
    "partitions": {"policy": "gpu", "rollout": "gpu-small", "controller": "cpu"},
    "gpus": {"style": "gres", "per_node": 8},
    "cpus": {"per_node": 64, "per_gpu": 8},
    "mem": {"per_node": "200G"},
    "python": PYTHON,
    "network": {"interface": "ib0"},
    "paths": {"hf_home": "/shared/hf", "local": "/local"},
}

Case = tuple[dict[str, Any], dict[str, Any]]
CASES: dict[str, Case] = {
    "het_1x1": ({}, {}),
    "het_8x4_controller": (
        {
            "policy": {"parallel": {"dp_shard": 64}},
            "rollout": {"replicas": 16},
            "cluster": {
                "controller": {"separate": True, "cpus": 4, "sbatch": ["--hint=nomultithread"]},
                "policy": {
                    "nodes": 8,
                    "constraint": "a100&ib",
                    "sbatch": ["--exclude=cpu1", "--exclusive"],
                    "mem": "480G",
                },
                "rollout": {"nodes": 4, "sbatch": ["--contiguous"]},
            },
        },
        {"account": "project1", "qos": "normal", "gpus": {"style": "gpus_per_node"}},
    ),
    "shared_one_node": (
        {
            "policy": {"parallel": {"dp_shard": 4}},
            "rollout": {"replicas": 4, "parallel": {"tp": 1}},
            "cluster": {"placement": "shared"},
        },
        {"partitions": {"policy": "gpu", "rollout": "gpu"}},
    ),
    "shared_two_nodes": (
        {"cluster": {"placement": "shared"}},
        {"partitions": {"policy": "gpu", "rollout": "gpu"}},
    ),
    "pyxis": (
        {"cluster": {"variables": {"NCCL_DEBUG": "WARN"}}},
        {
            "container": {
                "runtime": "pyxis",
                "images": {"policy": "/shared/train.sqsh", "rollout": "/shared/vllm.sqsh"},
                "mounts": ["/scratch:/scratch", "/data:/mnt/data:ro"],
                "args": ["--container-remap-root"],
            }
        },
    ),
    "apptainer": (
        {"cluster": {"rollout": {"image": "/shared/vllm nightly.sif"}}},
        {
            "container": {
                "runtime": "apptainer",
                "images": {"policy": "/shared/train.sif"},
                "mounts": ["/scratch:/scratch"],
                "args": ["--ipc"],
            }
        },
    ),
    "reward_and_teacher": (
        {
            "reward": [{"name": "model", "path": "example/reward"}, {"name": "exact"}],
            "algorithm": {"name": "distill"},
            "teacher": {"path": "example/teacher"},
            "cluster": {
                "reward": {"replicas": 3, "partition": "gpu", "constraint": "a100"},
                "teacher": {"replicas": 2, "gpus_per_replica": 4, "nodes": 2},
            },
        },
        {"container": {"runtime": "pyxis", "images": {"rollout": "/shared/vllm.sqsh"}}},
    ),
    "shared_reward": (
        {
            "reward": [{"name": "model", "path": "example/reward"}],
            "policy": {"parallel": {"dp_shard": 4}},
            "rollout": {"replicas": 2, "parallel": {"tp": 1}},
            "cluster": {"placement": "shared", "reward": {"replicas": 2}},
        },
        {"partitions": {"policy": "gpu", "rollout": "gpu"}},
    ),
    "modules": ({}, {"setup": ["module purge", "module load cuda/12.9 python/3.11", "ulimit -l unlimited"]}),
    "template": (
        {"cluster": {"template": str(TEMPLATES / "recipe.sbatch.j2")}},
        {"template": str(TEMPLATES / "site.sbatch.j2"), "setup": ["module load cuda"]},
    ),
    "sft": ({"kind": "sft", "algorithm": {}, "reward": [], "rollout": None}, {"requeue": False}),
}
HET = [name for name in CASES if not name.startswith("shared") and name != "sft"]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, section by section."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) and value else value
        )
    return result


def build(recipe: dict[str, Any], site: dict[str, Any]) -> tuple[Recipe, Plan, Site]:
    """Recipe, plan and site of changes laid over the base case, through the real loader and planner."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(merged(_RL, recipe)), encoding="utf-8")
        loaded = load_recipe(file)
    profile = Site.model_validate(merged(_SITE, site))
    plan = make_plan(loaded, profile)
    return resolve_recipe(loaded, profile, plan), plan, profile


@cache
def _case(name: str) -> tuple[Recipe, Plan, Site]:
    return build(*CASES[name])


def script_of(name: str) -> JobScript:
    recipe, plan, site = _case(name)
    return JobScript.of(recipe, plan, site, run_dir=RUN_DIR, log=LOG)


@cache
def script_text(name: str) -> str:
    return script_of(name).render(FOLDER)


@cache
def step_lines(name: str) -> str:
    """The srun command of the policy and of the first and last replica, one word per line."""
    recipe, plan, site = _case(name)
    blocks = []
    for group in plan.groups:
        if group.role == "controller":
            continue
        indices = [0] if group.role == "policy" else sorted({0, group.tasks - 1})
        for index in indices:
            python = role_python(site, group, "/usr/bin/python3")
            command = [python, "-m", MODULES[group.role], str(RUN_DIR)]
            log = RUN_DIR / f"logs/attempt_1/{group.role}_{'%t' if group.role == 'policy' else index}.log"
            names = role_environment(plan, site, recipe, group.role)
            argv = step_argv(
                plan, site, group.role, index, command, log, run_dir=RUN_DIR, incarnation=1, variables=names
            )
            blocks.append("\n".join(argv))
    return "\n\n".join(blocks) + "\n"


def update() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for name in CASES:
        (GOLDEN / f"{name}.sbatch").write_text(script_text(name), encoding="utf-8")
        (GOLDEN / f"{name}.steps").write_text(step_lines(name), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update-golden"]:
        raise SystemExit(__doc__)
    update()
