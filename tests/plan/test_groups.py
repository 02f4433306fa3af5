"""GPU, node and CPU arithmetic of every placement, and what is said when it does not come out even."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_rl.plan import Plan, Site, make_plan
from hpc_rl.recipe import RecipeError, load_recipe

Make = Callable[..., Plan]


def test_het_groups_are_components_in_order(plan: Make) -> None:
    made = plan(
        "cluster.controller.separate=true",
        partitions={"policy": "big", "rollout": "small", "controller": "cpu"},
    )
    assert [(g.role, g.component, g.job_name, g.partition) for g in made.groups] == [
        ("controller", 0, "gsm8k-grpo:controller", "cpu"),
        ("policy", 1, "gsm8k-grpo:policy", "big"),
        ("rollout", 2, "gsm8k-grpo:rollout", "small"),
    ]
    controller, policy, rollout = made.groups
    assert (controller.gpus_per_node, controller.cpus_per_task, controller.mem) == (0, 2, "8G")
    assert (policy.tasks, policy.tasks_per_node, policy.gpus_per_task, policy.gpus_per_node) == (8, 8, 1, 8)
    assert policy.cpus_per_task == 8
    assert (rollout.tasks, rollout.gpus_per_task) == (8, 1)
    assert made.prompts_per_step == 32
    assert made.time_minutes == 480


def test_without_a_separate_controller_policy_is_component_0(plan: Make) -> None:
    assert [(g.role, g.component) for g in plan().groups] == [("policy", 0), ("rollout", 1)]


def test_sft_is_one_group(plan: Make) -> None:
    made = plan("cluster.controller.separate=true", recipe="gsm8k-sft")
    assert [(g.role, g.component) for g in made.groups] == [("policy", 0)]
    assert made.total_steps is None  # epochs: known when the data is counted
    assert made.prompts_per_step == 0


def test_eight_plus_four_nodes(plan: Make) -> None:
    made = plan(
        "policy.parallel={dp_replicate: 2, dp_shard: 32}", "cluster.policy.nodes=8",
        "rollout={replicas: 8, parallel: {tp: 4}}", "cluster.rollout.nodes=4",
    )  # fmt: skip
    policy, rollout = made.groups
    assert (policy.nodes, policy.tasks, policy.tasks_per_node) == (8, 64, 8)
    assert (rollout.nodes, rollout.tasks, rollout.tasks_per_node, rollout.gpus_per_task) == (4, 8, 2, 4)
    assert made.mesh.world_size == 64
    assert made.warnings == []


def test_shared_puts_all_on_one_node_where_it_fits(plan: Make) -> None:
    made = plan(recipe="gsm8k-grpo-one-node", cpus={"per_node": 64})
    assert [(g.component, g.first_node, g.nodes, g.gpus_per_node) for g in made.groups] == [
        (0, 0, 1, 4),
        (0, 0, 1, 4),
    ]
    assert [g.cpus_per_task for g in made.groups] == [8, 8]


def test_shared_uses_node_after_node_where_it_does_not(plan: Make) -> None:
    made = plan("cluster.placement=shared")
    assert [(g.component, g.first_node, g.nodes) for g in made.groups] == [(0, 0, 1), (0, 1, 1)]


def test_shared_wants_one_partition(plan: Make) -> None:
    with pytest.raises(RecipeError, match="one allocation in one partition, not big, small; use het"):
        plan("cluster.placement=shared", partitions={"policy": "big", "rollout": "small"})


def test_cpu_site_has_no_gpus_and_splits_cpus(plan: Make) -> None:
    keys = {"gpus": {"style": "none"}, "cpus": {"per_node": 16}}
    made = plan("policy.parallel.dp_shard=2", "rollout.replicas=4", "cluster.placement=shared", **keys)
    assert [(g.gpus_per_task, g.gpus_per_node, g.cpus_per_task) for g in made.groups] == [
        (0, 0, 2),
        (0, 0, 2),
    ]
    made = plan("policy.parallel.dp_shard=2", "rollout.replicas=4", **keys)
    assert [g.cpus_per_task for g in made.groups] == [8, 4]  # het: each has a node of its own


def test_local_has_no_components_and_splits_this_machine(plan: Make) -> None:
    from hpc_rl.plan.groups import cpus_here, gpus_here

    made = plan(
        "policy.parallel.dp_shard=1", "rollout.replicas=1", "cluster.placement=local",
        "cluster.policy.gpus_per_node=0", "cluster.rollout.gpus_per_node=0",
    )  # fmt: skip
    assert [(g.component, g.nodes, g.gpus_per_task) for g in made.groups] == [(None, 1, 0), (None, 1, 0)]
    assert [g.cpus_per_task for g in made.groups] == [max(1, cpus_here() // 2)] * 2
    assert gpus_here() >= 0


def test_local_gpus_are_split_between_the_roles(plan: Make) -> None:
    keys = {"placement": "local", "gpus": {"style": "none", "per_node": 2}}
    made = plan("policy.parallel.dp_shard=1", "rollout.replicas=1", **keys)
    assert [g.gpus_per_node for g in made.groups] == [1, 1]
    with pytest.raises(
        RecipeError, match=r"this machine has 2 GPUs but 4 are needed \(policy 2, rollout 2\)"
    ):
        plan("policy.parallel.dp_shard=2", "rollout.replicas=2", **keys)


def test_group_options_win_over_the_site(plan: Make) -> None:
    made = plan(
        "cluster.policy={partition: mine, account: a, qos: q, constraint: c, mem: 10G, cpus_per_task: 3}",
        "cluster.policy.image=i", "cluster.policy.variables.A=2", "cluster.variables={A: 1, B: 1}",
        "cluster.policy.sbatch=[--exclusive]",
        account="site", sbatch={"policy": ["--switches=1"], "rollout": []}, variables={"B": "0", "C": "0"},
        mem={"per_node": "800G"},
    )  # fmt: skip
    policy, rollout = made.groups
    assert (policy.partition, policy.account, policy.qos, policy.constraint) == ("mine", "a", "q", "c")
    assert (policy.mem, policy.cpus_per_task, policy.image) == ("10G", 3, "i")
    assert policy.variables == {"A": "2", "B": "1", "C": "0"}
    assert policy.sbatch == ["--switches=1", "--exclusive"]
    assert (rollout.account, rollout.mem, rollout.variables["A"]) == ("site", "800G", "1")


def test_part_of_a_node_gets_its_share_of_memory(plan: Make) -> None:
    made = plan("policy.parallel.dp_shard=2", "rollout.replicas=8", mem={"per_node": "800G"})
    assert [g.mem for g in made.groups] == [f"{200 * 1024}M", "800G"]
    assert plan("policy.parallel.dp_shard=2", mem={"per_node": "0"}).groups[0].mem == "0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["policy.parallel={dp_shard: 4, tp: 2, pp: 2}"],
            "dp_replicate 1 x dp_shard 4 x tp 2 x pp 2 x cp 1 = 16 ranks, "
            "but cluster.policy.nodes 1 x 8 GPUs = 8; use 2 nodes or fewer ranks",
        ),
        (
            ["cluster.policy.nodes=3"],
            "= 8 ranks cannot be spread evenly over cluster.policy.nodes 3; "
            "use a number of nodes that divides 8",
        ),
        (
            ["rollout.replicas=9"],
            "rollout.replicas: 9 replicas (tp 1 x pp 1 = 1 GPUs per replica) do not fit on "
            "cluster.rollout.nodes 1 with 8 GPUs each (8 fit); use 2 nodes or 8 replicas",
        ),
        (
            ["rollout={replicas: 3, parallel: {tp: 3}}"],
            "3 replicas (tp 3 x pp 1 = 3 GPUs per replica) do not fit on cluster.rollout.nodes 1 "
            "with 8 GPUs each (2 fit); use 2 nodes or 2 replicas",
        ),
        (
            ["rollout={replicas: 1, parallel: {tp: 16}}", "cluster.rollout.nodes=1"],
            "tp 16 x pp 1 = 16 GPUs per replica, but a node has 8; a replica must fit on one node",
        ),
        (
            ["rollout.replicas=1", "cluster.rollout.nodes=2"],
            "1 replicas leave some of the 2 nodes of cluster.rollout.nodes idle; use at most 1 nodes",
        ),
        (["cluster.placement=split"], "cluster.placement: is 'split', which is not available"),
        (["cluster.policy.cpus_per_task=9"], "8 tasks x 9 CPUs do not fit the site's 64 CPUs per node"),
        (["cluster.reward={nodes: 1}"], "cluster.reward: no reward of this recipe is a model: remove it"),
    ],
)
def test_what_does_not_fit(plan: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(*overrides)
    assert message in str(caught.value)


def test_time_beyond_the_site(plan: Make) -> None:
    with pytest.raises(RecipeError, match=r"cluster.time: is '08:00:00'; site gpus allows 04:00:00"):
        plan(time_max="04:00:00")


def test_idle_nodes_are_a_warning(plan: Make) -> None:
    made = plan("cluster.policy.nodes=2", "cluster.rollout.nodes=4")
    assert made.warnings == [
        "policy: 8 ranks on 2 nodes use 4 of 8 GPUs each; 1 nodes would do",
        "rollout: 8 replicas would fit on 1 nodes instead of 4",
    ]


def test_a_thousand_nodes_take_less_than_a_second(plan: Make) -> None:
    start = time.perf_counter()
    made = plan(
        "policy.parallel={dp_replicate: 8, dp_shard: 800}", "policy.batch_size=12800",
        "cluster.policy.nodes=800",
        "rollout.replicas=1600", "cluster.rollout.nodes=200",
    )  # fmt: skip
    assert time.perf_counter() - start < 1.0
    assert sum(g.nodes for g in made.groups) == 1000


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shard=st.integers(1, 32), tp=st.integers(1, 4), nodes=st.integers(1, 6), replicas=st.integers(1, 32),
    width=st.integers(1, 8), rollout_nodes=st.integers(1, 6), gpus=st.sampled_from([1, 2, 4, 8]),
)  # fmt: skip
def test_whatever_is_planned_fits(
    plan: Make, shard: int, tp: int, nodes: int, replicas: int, width: int, rollout_nodes: int, gpus: int
) -> None:
    """Either an error, or every task has its GPUs on a node that has that many."""
    try:
        made = plan(
            f"policy.parallel={{dp_shard: {shard}, tp: {tp}}}", f"policy.batch_size={shard * 8}",
            f"cluster.policy.nodes={nodes}", f"rollout.replicas={replicas}", f"rollout.parallel.tp={width}",
            f"cluster.rollout.nodes={rollout_nodes}",
            gpus={"style": "gres", "per_node": gpus}, cpus={},
        )  # fmt: skip
    except RecipeError:
        assert (
            shard * tp > nodes * gpus
            or (shard * tp) % nodes
            or width > gpus
            or -(-replicas // rollout_nodes) > gpus // width
            or replicas < rollout_nodes
        )
        return
    policy, rollout = made.groups
    assert policy.tasks == made.mesh.world_size == policy.nodes * policy.tasks_per_node
    assert rollout.tasks <= rollout.nodes * rollout.tasks_per_node
    for group in made.groups:
        assert group.tasks_per_node * group.gpus_per_task == group.gpus_per_node <= gpus


def test_gpus_that_this_machine_has_not_are_ignored_with_a_warning(plan: Make) -> None:
    keys = {"placement": "local", "gpus": {"style": "none", "per_node": 0}}
    made = plan("policy.parallel.dp_shard=1", "rollout.replicas=1", "cluster.policy.gpus_per_node=4", **keys)
    assert [(g.gpus_per_task, g.gpus_per_node) for g in made.groups] == [(0, 0), (0, 0)]
    (warning,) = [text for text in made.warnings if "gpus_per_node" in text]
    assert warning.startswith("override 'cluster.policy.gpus_per_node=4': cluster.policy.gpus_per_node 4 is")


def test_what_only_slurm_understands_is_a_warning_under_local(plan: Make) -> None:
    said = [
        "cluster.policy.sbatch=[--exclusive]", "cluster.rollout.mem=10G", "cluster.policy.nodes=1",
        "cluster.controller.partition=cpu", "policy.parallel.dp_shard=1", "rollout.replicas=1",
    ]  # fmt: skip
    made = plan(*said, placement="local", gpus={"style": "none"})
    (warning,) = [text for text in made.warnings if "ignores" in text]
    assert warning.endswith(
        "placement local starts no Slurm job and ignores cluster.controller.partition, "
        "cluster.policy.sbatch, cluster.rollout.mem"
    )
    assert not any("ignores" in text for text in plan(*said).warnings)


@pytest.mark.parametrize("placement", ["shared", "het"])
def test_inside_an_allocation_partitions_and_memory_mean_nothing(placement: str) -> None:
    loaded = load_recipe("gsm8k-grpo", [f"cluster.placement={placement}", "cluster.policy.partition=huge"])
    loaded.recipe.cluster.policy.mem = "9T"
    site = Site(name="s", partitions={"policy": "big", "rollout": "small"}, mem={"per_node": "64G"})  # type: ignore[arg-type]
    made = make_plan(loaded, site, here=True)
    assert [(group.partition, group.mem) for group in made.groups] == [(None, None)] * 2
    assert made.placement == placement
