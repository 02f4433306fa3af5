"""From the plan's groups to the components of a job: every sbatch option of each, none inherited.

Slurm hands some options of a component on to the later ones and not others; which ones has changed
between versions. So every component says everything, and what cannot be un-said is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_rl.plan.schema import Group, Plan
from hpc_rl.plan.site import Site


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Options that later components inherit from earlier ones when they do not set them.
_PROPAGATED = _words(
    """
    account qos mem mem-per-cpu mem-per-gpu reservation dependency nice begin deadline licenses mcs-label
    wckey exclude mail-type mail-user
    """
)
_RESET = ("exclude",)  # an empty value un-sets it (Slurm 22.05)
# Ours alone: another value would break signals, logs, requeue or the shape that the plan worked out.
_OURS = _words(
    """
    array export export-file output error open-mode signal time time-min job-name wrap parsable wait test-only
    hetjob chdir requeue no-requeue nodes ntasks ntasks-per-node input get-user-env
    """
)


@dataclass(frozen=True)
class Component:
    """One component of the job: who runs there, and submitit's parameters for it.

    `parameters` are keywords of submitit's Slurm executor; options that it lacks are in its
    `additional_parameters`.
    """

    role: str
    parameters: dict[str, Any]


def build_components(
    plan: Plan, site: Site, *, log: Path, work_dir: Path, signal_seconds: int, comment: str
) -> list[Component]:
    """The components in the order of their het-group numbers; one for SFT and for `placement: shared`.

    `log` is the batch step's log, `signal_seconds` the time before the walltime at which it gets USR2.
    Raises ValueError for options that Slurm would not apply as they were meant.
    """
    by_number: dict[int, list[Group]] = {}
    for group in plan.groups:
        if group.component is None:
            raise ValueError(f"placement {plan.placement} has no Slurm job")
        by_number.setdefault(group.component, []).append(group)
    if sorted(by_number) != list(range(len(by_number))):
        raise ValueError(f"component numbers must be 0..n-1, not {sorted(by_number)}")
    common = {
        "output": str(log).replace("%", "%%"),
        "chdir": str(work_dir),
        "signal": f"B:USR2@{signal_seconds}",
        "export": "ALL",
        ("requeue" if site.requeue else "no-requeue"): True,
    }
    components = [
        _component(plan, site, by_number[number], {**common}, comment) for number in sorted(by_number)
    ]
    _close_inheritance(components)
    return components


def gpu_option(site: Site, count: int) -> tuple[str, str] | None:
    """(option, value) that asks for `count` GPUs per node in the site's way; None for no GPUs."""
    if count == 0 or site.gpus.style == "none":
        return None
    kind = f"{site.gpus.type}:{count}" if site.gpus.type else str(count)
    if site.gpus.style == "gpus_per_node":
        return "gpus-per-node", kind
    return "gres", f"gpu:{kind}"


def shared_nodes(groups: Sequence[Group]) -> int:
    """Nodes of an allocation that several groups share: they lie on one another or node after node."""
    return max(group.first_node + group.nodes for group in groups)


def megabytes(mem: str) -> int:
    """`500G` as sbatch reads it, in MB; 0 stands for all of a node. Raises ValueError."""
    units = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
    text = mem.strip().upper().removesuffix("B")
    unit = units.get(text[-1:])
    number = text[:-1] if unit is not None else text
    if not number.isdigit():
        raise ValueError(f"mem {mem!r} is not a size; write it as sbatch does, such as 500G")
    return int(int(number) * (unit or 1.0))


def _component(
    plan: Plan, site: Site, groups: list[Group], additional: dict[str, Any], comment: str
) -> Component:
    shape = _shape_of_one(site, groups[0]) if len(groups) == 1 else _shape_of_many(site, groups)
    name = groups[0].job_name if len(groups) == 1 else plan.name
    first = groups[0]
    parameters: dict[str, Any] = {
        "job_name": name,
        "partition": first.partition,
        "account": first.account,
        "qos": first.qos,
        "constraint": first.constraint,
        "time": plan.time_minutes,
        "comment": comment,
        **shape,
    }
    nodes, per_node = shape["nodes"], shape["ntasks_per_node"]
    additional |= {"ntasks": groups[0].tasks if len(groups) == 1 else nodes * per_node}
    role = first.role if len(groups) == 1 else "+".join(group.role for group in groups)
    for group in groups:
        additional.update(_extra(group))
    parameters = {key: value for key, value in parameters.items() if value is not None}
    if additional.keys() & {"gpus-per-task", "gres", "gpus-per-node", "gpus"}:
        for key in ("gres", "gpus_per_node", "gpus_per_task"):
            parameters.pop(key, None)
    parameters["additional_parameters"] = additional
    return Component(role, parameters)


def _shape_of_one(site: Site, group: Group) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "nodes": group.nodes,
        "ntasks_per_node": group.tasks_per_node,
        "cpus_per_task": group.cpus_per_task,
        "mem": group.mem,
    }
    if site.gpus.style == "gpus_per_task" and group.gpus_per_task:
        kind = f"{site.gpus.type}:" if site.gpus.type else ""
        return {**shape, "gpus_per_task": f"{kind}{group.gpus_per_task}"}
    return shape | _gpus(site, group.gpus_per_node)


def _shape_of_many(site: Site, groups: list[Group]) -> dict[str, Any]:
    """One homogeneous allocation: each node must hold the most that any of its groups' nodes hold."""
    for name in ("partition", "account", "qos", "constraint"):
        values = {getattr(group, name) for group in groups}
        if len(values) > 1:
            told = ", ".join(f"{group.role} {getattr(group, name)}" for group in groups)
            raise ValueError(
                f"placement shared is one allocation: every role needs the same {name} (now {told}); "
                "or use placement het"
            )
    nodes = shared_nodes(groups)
    cpus, gpus, mem = [0] * nodes, [0] * nodes, [0] * nodes
    for group in groups:
        for node in range(group.first_node, group.first_node + group.nodes):
            cpus[node] += group.tasks_per_node * group.cpus_per_task
            gpus[node] += group.gpus_per_node
            mem[node] += megabytes(group.mem or "0")
    whole = any(group.mem is not None and megabytes(group.mem) == 0 for group in groups)
    named = all(group.mem is not None for group in groups)
    shape: dict[str, Any] = {
        "nodes": nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": max(cpus),
        "mem": "0" if whole else f"{max(mem)}M" if named else None,
    }
    return shape | _gpus(site, max(gpus))


def _gpus(site: Site, count: int) -> dict[str, Any]:
    asked = gpu_option(site, count)
    return {} if asked is None else {asked[0].replace("-", "_"): asked[1]}


def _extra(group: Group) -> dict[str, Any]:
    """The `sbatch:` lines of a group as submitit's additional parameters."""
    found: dict[str, Any] = {}
    for line in group.sbatch:
        text = line.strip().removeprefix("#SBATCH").strip()
        name, equals, value = text.partition("=")
        if not equals and " " in name:
            name, _, value = name.partition(" ")
        key = name.removeprefix("--")
        where = f"cluster.{group.role}.sbatch: {line!r}"
        if not name.startswith("--") or not key or "\n" in text:
            raise ValueError(f"{where} is not a long sbatch option; write it as --option=value or --option")
        if key.startswith("container"):
            raise ValueError(
                f"{where}: only role steps enter the image; set `container` in the site profile or "
                f"cluster.{group.role}.image"
            )
        if key in _OURS:
            raise ValueError(
                f"{where}: --{key} is worked out by hpc-rl; remove it and use the recipe's own key"
            )
        found[key] = value.strip().strip("'\"") if value.strip() else True
    return found


def _close_inheritance(components: list[Component]) -> None:
    """Un-set or refuse what a component would inherit without having asked for it."""
    inherited: dict[str, str] = {}
    for component in components:
        additional = component.parameters["additional_parameters"]
        said = {key.replace("_", "-") for key in component.parameters} | set(additional)
        for option, owner in inherited.items():
            if option in said:
                continue
            if option in _RESET:
                additional[option] = ""
                continue
            raise ValueError(
                f"Slurm would hand --{option} of {owner} on to {component.role}; give {component.role} "
                f"its own, by the key of that name or by cluster.{component.role}.sbatch: [--{option}=...]"
            )
        for option in sorted(_PROPAGATED & said):
            if additional.get(option) != "":
                inherited.setdefault(option, component.role)
