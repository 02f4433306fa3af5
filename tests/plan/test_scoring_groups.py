"""The groups that serve models: their size, their place in the job, and what the site gives them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.plan import Plan
from hpc_rl.plan.groups import scoring_roles
from hpc_rl.recipe import RecipeError, load_recipe

Make = Callable[..., Plan]
DISTILL = "algorithm={name: distill, group_size: 8}"
MODEL = "reward=[{name: model, path: org/rm}, {name: gsm8k}]"


def test_a_model_reward_and_a_teacher_are_components_of_their_own(plan: Make) -> None:
    made = plan(
        MODEL, DISTILL, "teacher={path: org/large}", "cluster.controller.separate=true",
        "cluster.reward={nodes: 2, replicas: 5, partition: l40, image: rm.sqsh}",
        "cluster.teacher={gpus_per_replica: 4, replicas: 2}",
        partitions={"policy": "big", "rollout": "small", "teacher": "huge"},
        container={"runtime": "pyxis", "images": {"rollout": "vllm.sqsh"}},
        sbatch={"rollout": ["--exclusive"], "reward": []},
    )  # fmt: skip
    assert [(g.role, g.component) for g in made.groups] == [
        ("controller", 0), ("policy", 1), ("rollout", 2), ("reward", 3), ("teacher", 4)
    ]  # fmt: skip
    reward, teacher = made.group("reward"), made.group("teacher")
    assert (reward.nodes, reward.tasks, reward.tasks_per_node, reward.gpus_per_task) == (2, 5, 3, 1)
    assert (reward.gpus_per_node, reward.cpus_per_task, reward.job_name) == (3, 8, "gsm8k-grpo:reward")
    assert (reward.partition, reward.image, reward.sbatch) == ("l40", "rm.sqsh", [])
    assert (teacher.nodes, teacher.tasks, teacher.gpus_per_task, teacher.gpus_per_node) == (1, 2, 4, 8)
    # What the site does not say of a teacher is what it says of rollouts.
    assert (teacher.partition, teacher.image, teacher.sbatch) == ("huge", "vllm.sqsh", ["--exclusive"])


def test_without_cluster_reward_there_is_one_process(plan: Make) -> None:
    made = plan(MODEL, partitions={"policy": "big", "rollout": "small"})
    reward = made.group("reward")
    assert (reward.nodes, reward.tasks, reward.gpus_per_task, reward.partition) == (1, 1, 1, "small")
    assert [g.role for g in plan().groups] == ["policy", "rollout"]


def test_shared_puts_them_onto_the_node_where_they_fit(plan: Make) -> None:
    small = ["cluster.placement=shared", "policy.parallel.dp_shard=4", "rollout.replicas=3"]
    made = plan(MODEL, *small)
    assert [(g.role, g.component, g.first_node) for g in made.groups] == [
        ("policy", 0, 0), ("rollout", 0, 0), ("reward", 0, 0)
    ]  # fmt: skip
    made = plan(MODEL, DISTILL, "teacher.path=org/large", *small)
    assert [g.first_node for g in made.groups] == [0, 1, 2, 3]  # 9 GPUs: node after node


def test_local_gives_each_its_gpus(plan: Make) -> None:
    local = ["policy.parallel.dp_shard=1", "rollout.replicas=1", "cluster.reward.replicas=2", MODEL]
    made = plan(*local, placement="local", gpus={"style": "none", "per_node": 4})
    assert [(g.role, g.component, g.gpus_per_node) for g in made.groups] == [
        ("policy", None, 1), ("rollout", None, 1), ("reward", None, 2)
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"4 are needed \(policy 1, rollout 1, reward 2\)"):
        plan(*local, placement="local", gpus={"style": "none", "per_node": 3})
    said = plan(
        *local, "cluster.reward.partition=x", placement="local", gpus={"style": "none", "per_node": 0}
    )
    assert any("ignores cluster.reward.partition" in warning for warning in said.warnings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [MODEL, "cluster.reward={replicas: 9}"],
            "cluster.reward.replicas: 9 replicas (1 GPUs per replica) do not fit on cluster.reward.nodes 1 "
            "with 8 GPUs each (8 fit); use 2 nodes or 8 replicas",
        ),
        (
            [DISTILL, "teacher.path=org/l", "cluster.teacher={gpus_per_replica: 16}"],
            "cluster.teacher.gpus_per_replica: 16 GPUs per replica, but a node has 8; "
            "a replica must fit on one node",
        ),
        (
            [DISTILL, "teacher.path=org/l", "cluster.teacher={nodes: 3, replicas: 2}"],
            "cluster.teacher.replicas: 2 replicas leave some of the 3 nodes of cluster.teacher.nodes idle",
        ),
        (["cluster.teacher={replicas: 2}"], "cluster.teacher: this recipe has no teacher: remove it, or say"),
        (
            ["reward=[{name: model, path: m, memory_gb: 4}]"],
            "reward.0.memory_gb: bounds scorer processes; this reward is a model of the reward group",
        ),
        (["reward=[{name: model}]"], "reward.0.path: is required and missing"),
        (
            ["reward=[{name: model, path: m, template: '{response}'}]"],
            "template is for kind: judge; a classifier has label",
        ),
        (
            ["reward=[{name: model, path: m, kind: judge, template: 'is {prompt} fine?'}]"],
            "must show the judge the {response}",
        ),
        (
            ["reward=[{name: model, path: m, kind: judge, pattern: 'Score'}]"],
            'reward.0.pattern: is "Score"; must have exactly one group: the number',
        ),
        (
            ["reward=[{name: model, path: m, kind: judge, value: log_odds, max_tokens: 9}]"],
            "value log_odds reads one token; pattern and max_tokens are for number",
        ),
        (
            ["reward=[{name: model, path: m, kind: judge, label: 1}]"],
            "label is for kind: classifier; a judge has template and value",
        ),
    ],
)
def test_what_is_refused(plan: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(*overrides)
    assert message in str(caught.value)


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "rm").mkdir()
    (tmp_path / "r.yaml").write_text(
        "extends: gsm8k-grpo\nname: x\nalgorithm: {name: distill, group_size: 8}\n"
        "reward: [{name: model, path: rm}]\nteacher: {path: ./large}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml").recipe
    assert recipe.reward[0]["path"] == str(tmp_path / "rm")
    assert recipe.teacher is not None and recipe.teacher.path == str(tmp_path / "large")


def test_models_that_do_not_fit_are_a_warning(plan: Make, model_folder: Callable[..., Path]) -> None:
    """8 GiB in bf16 and the same again in fp32, by the files' headers alone, on GPUs of 20."""
    folder = model_folder(num_attention_heads=4, hidden_size=64, num_hidden_layers=2, vocab_size=64)
    header = {"w": {"dtype": "BF16", "shape": [4 * 2**30], "data_offsets": [0, 8 * 2**30]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    gpus = {"style": "gres", "per_node": 8, "memory_gb": 20}
    two = f"reward=[{{name: model, path: {folder}}}, {{name: model, path: {folder}, dtype: float32}}]"
    (warning,) = [text for text in plan(two, gpus=gpus).warnings if text.startswith("reward:")]
    assert warning == (
        "reward: weights need 24.0 GiB per GPU, the site's GPUs have 20; "
        "raise cluster.reward.gpus_per_replica"
    )
    assert not [
        x for x in plan(two, "cluster.reward.gpus_per_replica=2", gpus=gpus).warnings if "reward" in x
    ]


def test_an_evaluation_alone_asks_no_teacher() -> None:
    loaded = load_recipe("gsm8k-grpo", [DISTILL, "teacher.path=org/large", MODEL])
    assert scoring_roles(loaded.recipe) == ["reward", "teacher"]
    loaded.recipe.eval.only = True
    assert scoring_roles(loaded.recipe) == ["reward"]
