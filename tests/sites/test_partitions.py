"""What sinfo says, in the forms of several Slurm versions, against what the plan asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from hpc_rl.cluster.partitions import SINFO, check_partitions, parse_sinfo, partition_findings
from hpc_rl.cluster.slurm.commands import SlurmError
from hpc_rl.plan import Plan, Site, make_plan
from hpc_rl.recipe import load_recipe

TEXT = """\
cpu*|up|4|64|257000|(null)|1-00:00:00
gpu|up|8|64|515000|gpu:a100:4(S:0-1)|infinite
gpu|up|2|32|515000|gpu:a100:2|infinite
mixed|up|3|128+|1000000+|gpu:h100:8(IDX:0-7),nvme:1|2:00:00
old|inact|1|16|64000|gpu:2|n/a
tiny|up|1|4|1000|gpu:no_consume:1|30:00
"""


def plan(*overrides: str, **gpus: Any) -> Plan:
    site = Site(name="s", gpus={"style": "gres", "per_node": 4, **gpus}, cpus={"per_gpu": 8})  # type: ignore[arg-type]
    words = ["policy.parallel.dp_shard=4", "rollout.replicas=4", *overrides]
    return make_plan(load_recipe("gsm8k-grpo", words), site)


def errors(made: Plan) -> list[str]:
    found = partition_findings(made, parse_sinfo(TEXT))
    return [f"{f.where}: {f.message}" for f in found if f.level == "error"]


GPU = ["cluster.policy.partition=gpu", "cluster.rollout.partition=gpu"]


def test_parsing() -> None:
    partitions = parse_sinfo(TEXT + "\nnoise\nslurm_load_partitions: warning|x\n")
    assert sorted(partitions) == ["cpu", "gpu", "mixed", "old", "tiny"]
    assert partitions["cpu"].default
    assert (partitions["cpu"].time_minutes, partitions["gpu"].time_minutes) == (1440, None)
    assert (partitions["mixed"].time_minutes, partitions["tiny"].time_minutes) == (120, 30)
    assert partitions["gpu"].nodes == 10
    assert partitions["gpu"].kinds[0].gpus == {"a100": 4}
    assert partitions["mixed"].kinds[0].gpus == {"h100": 8}
    assert partitions["mixed"].kinds[0].cpus == 128
    assert partitions["old"].kinds[0].gpus == {"": 2}
    assert not partitions["old"].up


def test_a_plan_that_fits() -> None:
    found = partition_findings(plan(*GPU), parse_sinfo(TEXT))
    assert [(f.level, f.where) for f in found] == [("ok", "cluster.policy"), ("ok", "cluster.rollout")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["cluster.policy.partition=gpus", "cluster.rollout.partition=gpu"],
            "cluster.policy.partition: unknown partition 'gpus'. Did you mean 'gpu'? "
            "Partitions: cpu, gpu, mixed, old, tiny",
        ),
        (
            ["cluster.rollout.partition=gpu"],  # the default partition has no GPUs
            "cluster.policy: 1 nodes with 4 GPUs are asked for, but nodes of partition cpu have at most 0",
        ),
        (
            [*GPU, "cluster.policy.nodes=16", "policy.parallel.dp_shard=64"],
            "cluster.policy: 16 nodes are asked for, but partition gpu has 10",
        ),
        (
            [*GPU, "cluster.policy.nodes=9", "policy.parallel.dp_shard=36", "policy.batch_size=288"],
            "cluster.policy: 9 nodes with 4 GPUs are asked for, but nodes of partition gpu have at most 4",
        ),
        (
            [*GPU, "cluster.policy.cpus_per_task=20"],
            "cluster.policy: 4 tasks x 20 CPUs a node are asked for, "
            "but nodes of partition gpu have at most 64",
        ),
        (
            ["cluster.policy.partition=mixed", "cluster.rollout.partition=gpu"],
            "cluster.time: is longer than partition mixed allows (02:00:00)",
        ),
        (
            [*GPU, "cluster.policy.nodes=8", "policy.parallel.dp_shard=32", "cluster.rollout.nodes=4"],
            "cluster: the groups need 12 nodes of partition gpu together, which has 10",
        ),
    ],
)
def test_what_can_never_run_is_said(overrides: list[str], message: str) -> None:
    assert errors(plan(*overrides)) == [message]


def test_the_type_of_gpu_counts() -> None:
    assert errors(plan(*GPU, type="h100"))[0].endswith("nodes of partition gpu have at most 0")
    assert errors(plan(*GPU, type="a100")) == []


def test_slurm_that_does_not_answer_is_one_error() -> None:
    def broken(argv: Sequence[str]) -> str:
        assert tuple(argv) == SINFO
        raise SlurmError(
            "`sinfo` failed: sinfo: error: x\nsinfo: fatal: Could not establish a configuration source"
        )

    found = check_partitions(plan(*GPU), broken)
    assert [str(f) for f in found] == [
        "Slurm: sinfo does not answer: fatal: Could not establish a configuration source; "
        "run this where Slurm works, or without it: cluster.placement=local"
    ]
