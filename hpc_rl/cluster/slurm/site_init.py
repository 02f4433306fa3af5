"""A first draft of a site profile, from what sinfo and scontrol say of this cluster."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from hpc_rl.cluster.slurm.commands import SlurmError, check_slurm
from hpc_rl.cluster.slurm.states import seconds

SINFO_FORMAT = "%R|%a|%l|%D|%c|%m|%G|%f"
_GPU = re.compile(r"(?:^|,)gpu:(?:([A-Za-z][\w.-]*):)?(\d+)")

_ROLES = ("policy", "rollout", "controller")


@dataclass(frozen=True)
class NodeKind:
    """Nodes of one partition that are alike. `memory_mb` per node; `time_s` None: no limit."""

    partition: str
    up: bool
    time_s: int | None
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    gpu_type: str | None
    features: tuple[str, ...]


def read_kinds(text: str) -> list[NodeKind]:
    """`sinfo -h -e -o SINFO_FORMAT`, one line per partition and kind of node."""
    kinds = []
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 8:
            continue
        partition, up, limit, nodes, cpus, memory, gres, features = fields
        gpu = _GPU.search(gres)
        kinds.append(
            NodeKind(
                partition=partition,
                up=up == "up",
                time_s=seconds(limit),
                nodes=_number(nodes),
                cpus=_number(cpus),
                memory_mb=_number(memory),
                gpus=int(gpu[2]) if gpu else 0,
                gpu_type=gpu[1] if gpu else None,
                features=() if features in ("", "(null)") else tuple(features.split(",")),
            )
        )
    return kinds


def draft_site(name: str | None = None) -> str:
    """A profile of this cluster as YAML with comments. Raises SlurmError where Slurm does not answer."""
    kinds = read_kinds(check_slurm(["sinfo", "-h", "-e", "-o", SINFO_FORMAT]))
    if not kinds:
        raise SlurmError("sinfo shows no partition that you may use")
    config = check_slurm(["scontrol", "show", "config"])
    cluster = _setting(config, "ClusterName") or "cluster"
    data, notes = draft(kinds, name or cluster, cluster)
    notes += _config_notes(config)
    return write_yaml(data, kinds, notes)


def draft(kinds: list[NodeKind], name: str, cluster: str) -> tuple[dict[str, Any], list[str]]:
    """The profile as data, and what its owner should look at."""
    usable = [kind for kind in kinds if kind.up] or kinds
    gpu = [kind for kind in usable if kind.gpus]
    cpu = [kind for kind in usable if not kind.gpus]
    best, partitions = _partitions(gpu or usable, cpu)
    notes = []
    working = {partitions["policy"], partitions["rollout"]}
    others = sorted({kind.partition for kind in gpu} - working)
    if others:
        notes.append(f"other partitions with GPUs: {', '.join(others)}; rollout may use one of them")
    mine = [kind for kind in usable if kind.partition in working]
    types = Counter({kind.gpu_type: kind.nodes for kind in mine if kind.gpus})
    data: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9_.-]", "-", name),
        "description": f"drafted from sinfo of {cluster}",
        "detect": {"cluster_name": cluster},
        "placement": "het" if sum(kind.nodes for kind in mine) > 1 else "shared",
        "partitions": partitions,
        "gpus": {"style": "none"},
        "cpus": {"per_node": min(kind.cpus for kind in mine)},
        "mem": {"per_node": f"{min(kind.memory_mb for kind in mine)}M"},
    }
    if best.gpus:
        data["gpus"] = {"style": "gres", "per_node": best.gpus}
        where = " and ".join(sorted(working))
        data["cpus"] = {"per_node": best.cpus, "per_gpu": max(1, best.cpus // best.gpus)}
        if len(types) > 1:
            if len(working) == 1:  # one type for all roles would keep a role out of a partition of its own
                data["gpus"]["type"] = best.gpu_type
            notes.append(f"{where}: GPUs of types {', '.join(sorted(map(str, types)))}")
        notes.append("gpus.memory_gb: Slurm does not know it; set it for the memory check of plans")
    limits = [kind.time_s for kind in mine if kind.time_s is not None]
    if limits:
        data["time_max"] = _duration(min(limits))
    return data, notes


def _partitions(work: list[NodeKind], cpu: list[NodeKind]) -> tuple[NodeKind, dict[str, str]]:
    """(the policy's kind of node, partition per role). A partition that has a role's name in its own is
    that role's; else the one with the most GPUs (or nodes)."""

    def size(kind: NodeKind) -> int:
        return kind.nodes * max(kind.gpus, 1)

    best = max(_called("policy", work) or _unclaimed(work), key=size)
    rollout = max(_called("rollout", work), key=size, default=best)
    partitions = {"policy": best.partition, "rollout": rollout.partition}
    quiet = _called("controller", cpu) or _unclaimed(cpu)
    if quiet:
        partitions["controller"] = max(quiet, key=lambda kind: kind.nodes).partition
    return best, partitions


def _called(role: str, kinds: list[NodeKind]) -> list[NodeKind]:
    """Those whose partition is called like `role`; else those that have it in their name."""
    return [kind for kind in kinds if kind.partition.lower() == role] or [
        kind for kind in kinds if role in kind.partition.lower()
    ]


def _unclaimed(kinds: list[NodeKind]) -> list[NodeKind]:
    """Those that no role's name is in, if there are any."""
    return [kind for kind in kinds if not any(_called(role, [kind]) for role in _ROLES)] or kinds


def write_yaml(data: dict[str, Any], kinds: list[NodeKind], notes: list[str]) -> str:
    """The draft with what was seen as comments above it."""
    import yaml

    lines = ["# Drafted by `hpc-rl site init`; see `site/example.yaml` for every key.", "# Partitions seen:"]
    for kind in kinds:
        gpus = f", {kind.gpus} x {kind.gpu_type or 'gpu'}" if kind.gpus else ""
        features = f", features {','.join(kind.features)}" if kind.features else ""
        lines.append(
            f"#   {kind.partition}: {kind.nodes} nodes, {kind.cpus} CPUs, {kind.memory_mb} MB{gpus}{features}"
        )
    lines += [f"# {note}" for note in notes]
    return "\n".join(lines) + "\n" + yaml.safe_dump(data, sort_keys=False)


def _config_notes(config: str) -> list[str]:
    """What of the cluster's configuration changes how runs behave there."""
    notes = []
    if _setting(config, "JobRequeue") == "0":
        notes.append("JobRequeue=0 here: jobs ask for --requeue themselves")
    if _setting(config, "SchedulerType") == "sched/builtin":
        notes.append("sched/builtin cannot start het jobs: use placement shared")
    if "accounting_storage/none" in _setting(config, "AccountingStorageType"):
        notes.append("no accounting: Slurm forgets ended jobs after MinJobAge; the run directory does not")
    if "wckeys" in _setting(config, "AccountingStorageEnforce"):
        notes.append("this cluster enforces WCKeys: add --wckey=... to `sbatch` of every role")
    return notes


def _setting(config: str, key: str) -> str:
    match = re.search(rf"^{key}\s*=\s*(.*)$", config, re.MULTILINE)
    return match[1].strip() if match else ""


def _number(text: str) -> int:
    """sinfo adds a `+` where nodes of a line differ."""
    digits = re.match(r"\d+", text.strip())
    return int(digits[0]) if digits else 0


def _duration(total: int) -> str:
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    text = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text
