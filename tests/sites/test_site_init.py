"""Which partition of a cluster a drafted profile gives to which role."""

from __future__ import annotations

import pytest

from hpc_rl.cluster.slurm.site_init import draft, read_kinds
from hpc_rl.plan.site import Site


def line(partition: str, nodes: int, gpu: str = "(null)") -> str:
    return f"{partition}|up|infinite|{nodes}|16|64000|{gpu}|(null)\n"


def drafted(*lines: str) -> tuple[Site, list[str]]:
    data, notes = draft(read_kinds("".join(lines)), "here", "here")
    return Site.model_validate(data), notes


@pytest.mark.parametrize(
    ("lines", "partitions"),
    [
        # devcluster: the partitions are called like the roles, and `cpu` is left
        (
            [line("cpu", 1), line("policy", 2), line("rollout", 2)],
            {"policy": "policy", "rollout": "rollout", "controller": "cpu"},
        ),
        # a part of the name is enough, but the whole name wins
        (
            [line("gpu-Rollout", 2, "gpu:4"), line("big", 64, "gpu:8"), line("policy", 2, "gpu:8")],
            {"policy": "policy", "rollout": "gpu-Rollout"},
        ),
        (
            [line("rollout", 1, "gpu:4"), line("rollout-old", 99, "gpu:4"), line("big", 9, "gpu:8")],
            {"policy": "big", "rollout": "rollout"},
        ),
        # a partition without GPUs is no rollout's where others have them
        (
            [line("rollout", 9), line("gpu", 2, "gpu:8"), line("controller", 1)],
            {"policy": "gpu", "rollout": "gpu", "controller": "controller"},
        ),
    ],
)
def test_a_partition_with_a_roles_name_is_that_roles(lines: list[str], partitions: dict[str, str]) -> None:
    assert drafted(*lines)[0].partitions == partitions


def test_roles_in_partitions_of_different_gpus_get_no_common_type() -> None:
    site, notes = drafted(line("policy", 2, "gpu:h100:8"), line("rollout", 2, "gpu:l40:8"))
    assert site.gpus.type is None
    assert "policy and rollout: GPUs of types h100, l40" in notes
    assert site.placement == "het"
