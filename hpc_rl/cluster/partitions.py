"""Do the plan's groups fit the partitions they name? Asked of `sinfo`, in a format of Slurm 20.11 to 25.x.

Plain `sbatch` accepts a component that can never run and lets it pend for ever, so this is looked at first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpc_rl.cluster.findings import Finding
from hpc_rl.cluster.slurm.commands import SlurmError, check_slurm
from hpc_rl.plan.schema import Group, Plan
from hpc_rl.recipe.checks import parse_time

# partition (a * marks the default) | up/down | nodes | CPUs | memory in MB | gres | time limit
SINFO = ("sinfo", "--noheader", "--exact", "--format=%P|%a|%D|%c|%m|%G|%l")
_GPU = re.compile(r"gpu(?::(?P<type>[A-Za-z][^:,(]*))?(?::(?P<count>\d+))?(?:\([^)]*\))?\Z")

Ask = Callable[[Sequence[str]], str]


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike."""

    nodes: int
    cpus: int
    memory_mb: int
    gpus: dict[str, int]  # type ("" where Slurm names none) -> number


@dataclass
class Partition:
    name: str
    default: bool
    up: bool
    time_minutes: int | None  # None: no limit
    kinds: list[NodeKind]

    @property
    def nodes(self) -> int:
        return sum(kind.nodes for kind in self.kinds)


def parse_sinfo(text: str) -> dict[str, Partition]:
    """Partitions by name from the output of `SINFO`. Lines that do not have its fields are left out."""
    partitions: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) != 7:
            continue
        name, available, nodes, cpus, memory, gres, limit = (item.strip() for item in fields)
        partition = partitions.setdefault(
            name.rstrip("*"),
            Partition(name.rstrip("*"), name.endswith("*"), available == "up", _limit(limit), []),
        )
        kind = NodeKind(_number(nodes), _number(cpus), _number(memory), _gpus(gres))
        if kind.nodes:
            partition.kinds.append(kind)
    return partitions


def _number(text: str) -> int:
    match = re.match(r"\d+", text)  # 4+ where nodes differ
    return int(match[0]) if match else 0


def _limit(text: str) -> int | None:
    try:
        return parse_time(text)
    except ValueError:  # infinite, n/a
        return None


def _gpus(gres: str) -> dict[str, int]:
    """`gpu:a100:4(S:0-1),nvme:1` -> {"a100": 4}."""
    found: dict[str, int] = {}
    for item in re.split(r",(?![^(]*\))", gres):
        match = _GPU.match(item.strip())
        if match:
            kind = match["type"] or ""
            found[kind] = found.get(kind, 0) + int(match["count"] or 1)
    return found


def check_partitions(plan: Plan, ask: Ask = check_slurm) -> list[Finding]:
    """Findings about every group's partition; one error when Slurm does not answer."""
    try:
        partitions = parse_sinfo(ask(SINFO))
    except SlurmError as error:
        fix = "run this where Slurm works, or without it: cluster.placement=local"
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[-1].removeprefix("sinfo: ")  # Slurm's last line says what was fatal
        return [Finding("error", "Slurm", f"sinfo does not answer: {reason}", fix)]
    if not partitions:
        return [
            Finding("error", "Slurm", "sinfo shows no partition to you", "ask your site which you may use")
        ]
    return partition_findings(plan, partitions)


def partition_findings(plan: Plan, partitions: dict[str, Partition]) -> list[Finding]:
    """The findings, given what sinfo said."""
    findings: list[Finding] = []
    wanted: dict[str, int] = {}
    for group in _allocations(plan):
        partition, found = _partition_of(group, partitions, plan)
        findings += found
        if partition is None:
            continue
        wanted[partition.name] = wanted.get(partition.name, 0) + group.nodes
        findings += _fits(group, partition, plan)
    for name, nodes in wanted.items():
        total = partitions[name].nodes
        if nodes > total and not any(finding.level == "error" for finding in findings):
            message = f"the groups need {nodes} nodes of partition {name} together, which has {total}"
            fix = "each component needs nodes of its own; use fewer, another partition, or placement shared"
            findings.append(Finding("error", "cluster", message, fix))
    return findings


def _allocations(plan: Plan) -> list[Group]:
    """What Slurm is asked for: each group, or under `shared` the first one widened to all nodes."""
    if plan.placement != "shared":
        return plan.groups
    nodes = max(group.first_node + group.nodes for group in plan.groups)
    return [plan.groups[0].model_copy(update={"nodes": nodes})]


def _partition_of(
    group: Group, partitions: dict[str, Partition], plan: Plan
) -> tuple[Partition | None, list[Finding]]:
    where = f"cluster.{group.role}.partition"
    if group.partition is None:
        default = next((partition for partition in partitions.values() if partition.default), None)
        if default is not None:
            return default, []
        listing = ", ".join(sorted(partitions))
        message = f"no partition is named and Slurm has no default one; partitions: {listing}"
        return None, [Finding("error", where, message)]
    # several may be named: Slurm takes the one that starts first
    known = [partitions[name] for name in group.partition.split(",") if name in partitions]
    unknown = [name for name in group.partition.split(",") if name not in partitions]
    if unknown:
        close = difflib.get_close_matches(unknown[0], partitions, n=1)
        hint = f". Did you mean '{close[0]}'?" if close else ""
        message = f"unknown partition '{unknown[0]}'{hint} Partitions: {', '.join(sorted(partitions))}"
        if plan.site_profile.get("partitions", {}).get(group.role) == group.partition:
            message += f" (named by site {plan.site})"
        return None, [Finding("error", where, message.replace("' Part", "'. Part"))]
    return known[0], []


def _fits(group: Group, partition: Partition, plan: Plan) -> list[Finding]:
    where = f"cluster.{group.role}"
    findings = []
    if not partition.up:
        message = f"partition {partition.name} is not up"
        findings.append(Finding("warning", where, message, "the job waits until it is"))
    if partition.time_minutes is not None and plan.time_minutes > partition.time_minutes:
        limit = f"{partition.time_minutes // 60:02d}:{partition.time_minutes % 60:02d}:00"
        message = f"is longer than partition {partition.name} allows ({limit})"
        findings.append(Finding("error", "cluster.time", message, f"use at most {limit}"))
    if group.nodes > partition.nodes:
        message = f"{group.nodes} nodes are asked for, but partition {partition.name} has {partition.nodes}"
        return [*findings, Finding("error", where, message)]
    kind = plan.site_profile.get("gpus", {}).get("type")
    cpus = group.tasks_per_node * group.cpus_per_task
    enough_gpus = [node for node in partition.kinds if _gpu_count(node, kind) >= group.gpus_per_node]
    if sum(node.nodes for node in enough_gpus) < group.nodes:
        most = max((_gpu_count(node, kind) for node in partition.kinds), default=0)
        name = f" of type {kind}" if kind else ""
        message = (
            f"{group.nodes} nodes with {group.gpus_per_node} GPUs{name} are asked for, "
            f"but nodes of partition {partition.name} have at most {most}"
        )
        return [*findings, Finding("error", where, message, "check site gpus.per_node and gpus.type")]
    if sum(node.nodes for node in enough_gpus if node.cpus >= cpus) < group.nodes:
        most = max(node.cpus for node in enough_gpus)
        message = (
            f"{group.tasks_per_node} tasks x {group.cpus_per_task} CPUs a node are asked for, "
            f"but nodes of partition {partition.name} have at most {most}"
        )
        findings.append(Finding("error", where, message, f"set {where}.cpus_per_task"))
    if not any(finding.level == "error" for finding in findings):
        text = f"{group.nodes} node(s) of partition {partition.name}"
        findings.append(Finding("ok", where, text))
    return findings


def _gpu_count(node: NodeKind, kind: str | None) -> int:
    return sum(node.gpus.values()) if kind is None else node.gpus.get(kind, 0)
