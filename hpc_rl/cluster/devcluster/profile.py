"""The site profiles of a devcluster: the YAML files that `--site` reads, written by `up`.

`devcluster.yaml` makes CPU runs, which really run here. `devcluster-gpu.yaml` asks Slurm for the fake GPUs:
for plans, scripts and steps that must look as on a GPU cluster; a role that opens its GPU finds none.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from hpc_rl.cluster.devcluster.spec import ProfileSpec

CPU, GPU = "devcluster", "devcluster-gpu"
_ROLES = ("controller", "policy", "rollout")


def site_profile(spec: ProfileSpec, *, gpus: bool = False) -> dict[str, Any]:
    """A profile as data. All nodes are this machine, so the network is the loopback interface.

    The CPU profile gives a node no more CPUs than the machine has: roles size their thread pools by them.
    """
    partitions = {role: spec.partition_of(role) for role in _ROLES}
    parts = [spec.partition(partitions[role]) for role in ("policy", "rollout")]
    nodes = [spec.node_partition(part) for part in parts]
    cpus = min(part.cpus for part in nodes)
    per_node = min(part.gpus for part in nodes)
    kinds = {part.gpu_type for part in nodes}
    return {
        "name": GPU if gpus else CPU,
        "description": f"devcluster: fake nodes on this machine, {'fake GPUs' if gpus else 'CPU runs'}",
        "placement": "het",
        "partitions": partitions,
        "gpus": (
            {"style": "gres", "type": kinds.pop() if len(kinds) == 1 else None, "per_node": per_node}
            if gpus
            else {"style": "none"}
        ),
        "cpus": {"per_node": cpus if gpus else min(cpus, os.cpu_count() or 1)},
        "mem": {"per_node": f"{min(part.memory_mb for part in nodes)}M"},
        "network": {"interface": "lo"},
        "paths": {"local": tempfile.gettempdir()},
    }


def has_gpus(spec: ProfileSpec) -> bool:
    """Whether both the policy and the rollout nodes have fake GPUs."""
    return all(
        spec.node_partition(spec.partition(spec.partition_of(role))).gpus for role in ("policy", "rollout")
    )


def write(spec: ProfileSpec, root: Path) -> None:
    """Write the CPU profile and, where there are GPUs, the other one."""
    header = (
        "# Site profile of a devcluster (fake nodes on one machine), written by `hpc-rl devcluster up`.\n"
    )
    for gpus in (False, True) if has_gpus(spec) else (False,):
        profile = site_profile(spec, gpus=gpus)
        path = root / f"{profile['name']}.yaml"
        path.write_text(header + yaml.safe_dump(profile, sort_keys=False))
