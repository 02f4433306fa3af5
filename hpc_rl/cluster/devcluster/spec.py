"""What a devcluster looks like: partitions, nodes, fake GPUs, accounting. Pure data, kept in the state file.

The numbers describe *declared* resources: Slurm believes them (`config_overrides`), the machine need not have
them. One process per declared CPU would of course be slow; the point is to run the real scheduler.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hpc_rl.cluster.devcluster.errors import DevClusterError

_NAME = re.compile(r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")
ROLES = ("policy", "rollout", "controller")


@dataclass(frozen=True)
class PartitionSpec:
    """One partition and the nodes it brings: `NAME1..NAMEn`, or `NODE_PREFIX1..n` when `node_prefix` is set.

    `over` names partitions whose nodes belong to this one as well (with `nodes=0`: only those). Jobs of a
    higher `priority_tier` preempt (requeue) those of a lower one, which have their own partition's `grace_s`
    (GraceTime) between the warning signal and the end. `memory_mb`, `cpus` and `gpus` are per node.
    """

    name: str
    nodes: int = 1
    cpus: int = 16
    memory_mb: int = 64_000
    gpus: int = 0
    gpu_type: str | None = None
    features: tuple[str, ...] = ()
    node_prefix: str | None = None
    over: tuple[str, ...] = ()
    priority_tier: int = 1
    grace_s: int = 0
    max_minutes: int | None = None
    default: bool = False

    @property
    def own_nodes(self) -> list[str]:
        prefix = self.node_prefix or self.name
        return [f"{prefix}{i}" for i in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class ProfileSpec:
    """A whole devcluster: its partitions, which of them each role uses, and whether slurmdbd runs.

    `accounts` and `qos` exist only with `accounting`; when any is given, Slurm enforces them.
    `kill_wait_s` is KillWait: how long a step has between SIGTERM and SIGKILL.
    """

    partitions: tuple[PartitionSpec, ...]
    roles: Mapping[str, str] = field(default_factory=dict)
    accounting: bool = False
    accounts: tuple[str, ...] = ()
    qos: tuple[str, ...] = ()
    kill_wait_s: int = 5
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [p.name for p in self.partitions]
        if not self.partitions:
            raise DevClusterError("a devcluster needs at least one partition")
        for part in self.partitions:
            _check_partition(part, names)
        nodes = [node for part in self.partitions for node in part.own_nodes]
        for kind, values in (("partition", names), ("node", nodes)):
            twice = sorted({v for v in values if values.count(v) > 1})
            if twice:
                raise DevClusterError(f"{kind} {', '.join(twice)} is named twice")
        if len(nodes) > 64:
            raise DevClusterError(f"{len(nodes)} nodes: a devcluster runs one slurmd per node, 64 at most")
        for role, partition in self.roles.items():
            if role not in ROLES or partition not in names:
                raise DevClusterError(
                    f"role {role}: {partition}: roles are {', '.join(ROLES)}; "
                    f"partitions are {', '.join(names)}"
                )
        if (self.accounts or self.qos) and not self.accounting:
            raise DevClusterError("accounts and qos need accounting=True (slurmdbd keeps them)")

    def partition(self, name: str) -> PartitionSpec:
        return next(part for part in self.partitions if part.name == name)

    def nodes_of(self, part: PartitionSpec) -> list[str]:
        """All nodes of a partition: its own and those of the partitions it lies `over`."""
        nodes = list(part.own_nodes)
        for name in part.over:
            nodes += [node for node in self.nodes_of(self.partition(name)) if node not in nodes]
        return nodes

    def node_partition(self, part: PartitionSpec) -> PartitionSpec:
        """The partition that describes the nodes of `part`: itself, or one it lies over."""
        return part if part.nodes else self.node_partition(self.partition(part.over[0]))

    def partition_of(self, role: str) -> str:
        """As set, else the partition of the same name, else (controller) one without GPUs, else the first."""
        if role in self.roles:
            return self.roles[role]
        names = [part.name for part in self.partitions]
        if role in names:
            return role
        cpu_only = [part.name for part in self.partitions if not part.gpus and part.nodes]
        return cpu_only[0] if role == "controller" and cpu_only else names[0]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProfileSpec:
        """The inverse of `to_json`. Lists become tuples again."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        values["partitions"] = tuple(_partition_from_json(part) for part in data["partitions"])
        return cls(**values)


def _partition_from_json(data: Mapping[str, Any]) -> PartitionSpec:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
    return PartitionSpec(**values)


def _check_partition(part: PartitionSpec, names: Sequence[str]) -> None:
    for name in (part.name, part.node_prefix or part.name):
        if not _NAME.match(name):
            raise DevClusterError(
                f"partition or node name {name!r}: letters, digits, - and _, starting with a letter"
            )
    unknown = [name for name in part.over if name not in names or name == part.name]
    if unknown:
        raise DevClusterError(f"partition {part.name} lies over unknown partition {', '.join(unknown)}")
    if part.nodes < 0 or (part.nodes == 0 and not part.over):
        raise DevClusterError(f"partition {part.name} has no nodes")
    if part.cpus < 1 or part.memory_mb < 1 or part.gpus < 0:
        raise DevClusterError(
            f"partition {part.name}: cpus and memory_mb must be at least 1, gpus at least 0"
        )


def default_spec(
    *,
    policy: int = 2,
    rollout: int = 2,
    cpu: int = 1,
    gpus: int = 4,
    accounting: bool = False,
    urgent: bool = False,
) -> ProfileSpec:
    """The layout of `hpc-rl devcluster up`: partitions policy, rollout and cpu.

    `gpus` are per policy and rollout node. With `urgent`, a partition of that name lies over all nodes with a
    higher tier, to try preemption.
    """
    wanted = [("policy", policy, gpus), ("rollout", rollout, gpus), ("cpu", cpu, 0)]
    parts = [
        PartitionSpec(name, nodes, gpus=here, features=(name,)) for name, nodes, here in wanted if nodes > 0
    ]
    return spec_of(parts, accounting=accounting, urgent=urgent)


def spec_of(parts: Sequence[PartitionSpec], *, accounting: bool = False, urgent: bool = False) -> ProfileSpec:
    """A layout of these partitions. The first is the default one unless another says so."""
    parts = list(parts)
    if parts and not any(part.default for part in parts):
        parts[0] = replace(parts[0], default=True)
    if urgent:
        parts.append(PartitionSpec("urgent", nodes=0, over=tuple(p.name for p in parts), priority_tier=10))
    return ProfileSpec(partitions=tuple(parts), accounting=accounting)


def parse_partition(text: str) -> PartitionSpec:
    """`NAME:NODES[:GPUS]`, the form of `--partition` on the command line."""
    fields = text.split(":")
    if not 2 <= len(fields) <= 3 or not all(f.isdigit() for f in fields[1:]):
        raise DevClusterError(
            f"--partition {text}: expected NAME:NODES or NAME:NODES:GPUS, for example policy:2:4"
        )
    return PartitionSpec(fields[0], nodes=int(fields[1]), gpus=int(fields[2]) if len(fields) == 3 else 0)
