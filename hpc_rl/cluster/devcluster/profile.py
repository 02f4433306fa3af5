"""The site profile of a devcluster: the YAML that `--site` reads, written by `up`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from hpc_rl.cluster.devcluster.spec import ProfileSpec

NAME = "devcluster"


def site_profile(spec: ProfileSpec, root: Path) -> dict[str, Any]:
    """The profile as data. Everything is on one machine, so the network is the loopback interface.

    GPUs are fake (`memory_gb` is therefore unknown): the style is `gres` where the policy and rollout
    partitions have any, else `none`.
    """
    partitions = {role: spec.partition_of(role) for role in ("policy", "rollout", "controller")}
    per_node = min(spec.partition(partitions[role]).gpus for role in ("policy", "rollout"))
    return {
        "name": NAME,
        "partitions": partitions,
        "gpus": {"style": "gres" if per_node else "none", "per_node": per_node, "memory_gb": None},
        "setup": [],
        "container": None,
        "network": {"interface": "lo"},
        "paths": {"shared": None, "hf_home": None, "local": tempfile.gettempdir()},
        "variables": {},
    }


def write(spec: ProfileSpec, root: Path) -> Path:
    path = root / f"{NAME}.yaml"
    header = "# Site profile of a devcluster (fake nodes on one machine), written by `hpc-rl devcluster up`.\n"
    path.write_text(header + yaml.safe_dump(site_profile(spec, root), sort_keys=False))
    return path
