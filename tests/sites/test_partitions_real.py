"""The partition rung against a real sinfo: the profile that the devcluster writes fits, more does not."""

from __future__ import annotations

import pytest

from hpc_rl.cluster.devcluster import DevCluster
from hpc_rl.cluster.findings import Finding
from hpc_rl.cluster.partitions import SINFO, check_partitions, parse_sinfo
from hpc_rl.cluster.sites import read_site
from hpc_rl.cluster.slurm.commands import check_slurm
from hpc_rl.plan import make_plan
from hpc_rl.recipe import load_recipe

pytestmark = pytest.mark.slurm


def findings(devcluster: DevCluster, *overrides: str) -> list[Finding]:
    profile = devcluster.gpu_site_profile
    assert profile is not None
    words = ["policy.parallel.dp_shard=2", "rollout.replicas=2", "cluster.policy.nodes=2", *overrides]
    plan = make_plan(load_recipe("gsm8k-grpo", words), read_site(profile))
    return check_partitions(plan, lambda argv: check_slurm(argv, environ=devcluster.env))


def test_real_sinfo(devcluster: DevCluster) -> None:
    partitions = parse_sinfo(check_slurm(SINFO, environ=devcluster.env))
    assert partitions["policy"].nodes == 2
    assert all(sum(kind.gpus.values()) > 0 for kind in partitions["policy"].kinds)
    assert [f.level for f in findings(devcluster)] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.policy.partition=polici"], "unknown partition 'polici'. Did you mean 'policy'?"),
        (
            ["cluster.policy.nodes=4", "policy.parallel.dp_shard=4"],
            "4 nodes are asked for, but partition policy has 2",
        ),
    ],
)
def test_real_sinfo_refuses(devcluster: DevCluster, overrides: list[str], message: str) -> None:
    assert any(message in f.message for f in findings(devcluster, *overrides) if f.level == "error")
