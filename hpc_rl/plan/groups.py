"""GPU and node arithmetic: how many nodes, tasks, GPUs and CPUs each role gets.

`Sizer` turns recipe and site into `Group`s and collects what does not fit as Problems.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from hpc_rl.plan.schema import Group, Role
from hpc_rl.plan.site import RoleName, Site
from hpc_rl.recipe.extensions import is_served
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.schema import GroupOptions, Recipe, ScoringOptions
from hpc_rl.recipe.yaml_source import Problem

Placement = Literal["het", "shared", "split", "local"]
ScoringRole = Literal["reward", "teacher"]
T = TypeVar("T")
SCORING_ROLES: tuple[ScoringRole, ...] = ("reward", "teacher")

CONTROLLER_MEM = "8G"  # a separate controller; het components would inherit the policy's otherwise


def cpus_here() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def gpus_here() -> int:
    """NVIDIA GPUs of this machine, by their device files (no driver library is loaded)."""
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def scoring_roles(recipe: Recipe) -> list[ScoringRole]:
    """The groups that serve models to the rollouts: `reward` where a reward is a model, and `teacher`, which
    nobody asks where nothing is trained."""
    if recipe.kind != "rl":
        return []
    teacher = recipe.teacher is not None and not recipe.eval.only
    wanted = {"reward": any(is_served(item) for item in recipe.reward), "teacher": teacher}
    return [role for role in SCORING_ROLES if wanted[role]]


@dataclass
class Sizer:
    """Works out the groups of one placement. `problems` and `warnings` fill as it goes."""

    loaded: LoadedRecipe
    site: Site
    placement: Placement
    here: bool = False  # inside an allocation that exists: what was asked of Slurm is settled
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe = self.loaded.recipe
        gpus = self.site.gpus.per_node
        if self.placement == "local" and (gpus is None or self.site.placement != "local"):
            gpus = gpus_here()  # a cluster's profile tells nothing about this machine
        self.site_gpus = gpus or 0
        self.site_cpus = cpus_here() if self.placement == "local" else self.site.cpus.per_node

    def groups(self) -> list[Group]:
        """Every group, in the order of the components."""
        groups = []
        separate = self.recipe.cluster.controller.separate and not self.recipe.eval.only
        if separate and self.placement == "het" and self.recipe.kind == "rl":
            groups.append(self._controller())
        if self.recipe.has_policy:
            groups.append(self._policy())
        if self.recipe.rollout is not None:
            groups.append(self._rollout())
        groups += [self._scoring(role) for role in scoring_roles(self.recipe)]
        if self.placement == "het":
            for index, group in enumerate(groups):
                group.component = index
        elif self.placement == "shared":
            self._share(groups)
        else:
            self._localise(groups)
        self._fill_cpus(groups)
        return groups

    def _partition(self, role: Role, options: GroupOptions) -> str | None:
        """The recipe's or the site's; an allocation that exists lies where it lies."""
        return None if self.here else options.partition or _of_role(self.site.partitions, role)

    def _bad(self, message: str, *path: str | int) -> None:
        self.problems.append(self.loaded.problem(message, *path))

    def _gpu_capacity(self, role: str, options: GroupOptions) -> int:
        """GPUs of a node that this role may use. A machine without any has none, whatever the recipe says."""
        if options.gpus_per_node is None:
            return self.site_gpus
        if self.placement == "local" and not self.site_gpus and options.gpus_per_node:
            self.warnings.append(
                f"{self.loaded.where('cluster', role, 'gpus_per_node')}: cluster.{role}.gpus_per_node "
                f"{options.gpus_per_node} is ignored: this machine has no GPU, {role} runs on the CPU"
            )
            return 0
        return options.gpus_per_node

    def _policy(self) -> Group:
        options, parallel = self.recipe.cluster.policy, self.recipe.policy.parallel
        tasks = parallel.dp_replicate * parallel.dp_shard * parallel.tp * parallel.pp * parallel.cp
        nodes, capacity = self._nodes(options), self._gpu_capacity("policy", options)
        shape = (
            f"dp_replicate {parallel.dp_replicate} x dp_shard {parallel.dp_shard} x tp {parallel.tp} "
            f"x pp {parallel.pp} x cp {parallel.cp} = {tasks} ranks"
        )
        if tasks % nodes:
            self._bad(
                f"{shape} cannot be spread evenly over cluster.policy.nodes {nodes}; "
                f"use a number of nodes that divides {tasks}",
                "policy",
                "parallel",
            )
        per_node = -(-tasks // nodes)
        if capacity and per_node > capacity:
            self._bad(
                f"{shape}, but cluster.policy.nodes {nodes} x {capacity} GPUs = {nodes * capacity}; "
                f"use {-(-tasks // capacity)} nodes or fewer ranks",
                "policy",
                "parallel",
            )
        elif capacity and nodes > 1 and tasks <= (nodes - 1) * capacity:
            self.warnings.append(
                f"policy: {tasks} ranks on {nodes} nodes use {per_node} of {capacity} GPUs each; "
                f"{-(-tasks // capacity)} nodes would do"
            )
        return self._group("policy", options, nodes, tasks, per_node, 1 if capacity else 0)

    def _rollout(self) -> Group:
        rollout, options = self.recipe.rollout, self.recipe.cluster.rollout
        assert rollout is not None
        width = rollout.parallel.tp * rollout.parallel.pp
        nodes, capacity = self._nodes(options), self._gpu_capacity("rollout", options)
        per_node = -(-rollout.replicas // nodes)
        shape = f"tp {rollout.parallel.tp} x pp {rollout.parallel.pp} = {width} GPUs per replica"
        if rollout.replicas < nodes:
            self._bad(
                f"{rollout.replicas} replicas leave some of the {nodes} nodes of cluster.rollout.nodes idle; "
                f"use at most {rollout.replicas} nodes",
                "rollout",
                "replicas",
            )
        if capacity and width > capacity:
            self._bad(
                f"{shape}, but a node has {capacity}; a replica must fit on one node", "rollout", "parallel"
            )
        elif capacity and per_node > capacity // width:
            room = capacity // width
            self._bad(
                f"{rollout.replicas} replicas ({shape}) do not fit on cluster.rollout.nodes {nodes} "
                f"with {capacity} GPUs each ({nodes * room} fit); "
                f"use {-(-rollout.replicas // room)} nodes or {nodes * room} replicas",
                "rollout",
                "replicas",
            )
        elif capacity and nodes > 1 and rollout.replicas <= (nodes - 1) * (capacity // width):
            enough = -(-rollout.replicas // (capacity // width))
            self.warnings.append(
                f"rollout: {rollout.replicas} replicas would fit on {enough} nodes instead of {nodes}"
            )
        return self._group("rollout", options, nodes, rollout.replicas, per_node, width if capacity else 0)

    def _scoring(self, role: ScoringRole) -> Group:
        """A replica of a group that serves models is one process with `gpus_per_replica` GPUs of a node."""
        options = getattr(self.recipe.cluster, role) or ScoringOptions()
        nodes, capacity = self._nodes(options), self._gpu_capacity(role, options)
        replicas, width = options.replicas, options.gpus_per_replica
        per_node = -(-replicas // nodes)
        shape = f"{width} GPUs per replica"
        if replicas < nodes:
            self._bad(
                f"{replicas} replicas leave some of the {nodes} nodes of cluster.{role}.nodes idle; "
                f"use at most {replicas} nodes",
                "cluster", role, "replicas",
            )  # fmt: skip
        if capacity and width > capacity:
            self._bad(
                f"{shape}, but a node has {capacity}; a replica must fit on one node",
                "cluster", role, "gpus_per_replica",
            )  # fmt: skip
        elif capacity and per_node > capacity // width:
            room = capacity // width
            self._bad(
                f"{replicas} replicas ({shape}) do not fit on cluster.{role}.nodes {nodes} with {capacity} "
                f"GPUs each ({nodes * room} fit); "
                f"use {-(-replicas // room)} nodes or {nodes * room} replicas",
                "cluster", role, "replicas",
            )  # fmt: skip
        return self._group(role, options, nodes, replicas, per_node, width if capacity else 0)

    def _nodes(self, options: GroupOptions) -> int:
        return 1 if self.placement == "local" else options.nodes

    def _group(
        self,
        role: Role,
        options: GroupOptions,
        nodes: int,
        tasks: int,
        tasks_per_node: int,
        gpus_per_task: int,
    ) -> Group:
        site, cluster = self.site, self.recipe.cluster
        gpus = gpus_per_task * tasks_per_node
        return Group(
            role=role,
            component=None,
            job_name=f"{self.recipe.name}:{role}",
            nodes=nodes,
            tasks=tasks,
            tasks_per_node=tasks_per_node,
            cpus_per_task=options.cpus_per_task or 0,  # 0: filled in when all groups are known
            gpus_per_task=gpus_per_task,
            gpus_per_node=(options.gpus_per_node or gpus) if gpus else 0,
            mem=self._mem(options, gpus),
            partition=self._partition(role, options),
            account=options.account or site.account,
            qos=options.qos or site.qos,
            constraint=options.constraint or site.constraint,
            image=options.image or _of_role(site.container.images, role),
            variables={**site.variables, **cluster.variables, **options.variables},
            sbatch=[*(_of_role(site.sbatch, role) or []), *options.sbatch],
        )

    def _controller(self) -> Group:
        options = self.recipe.cluster.controller
        base = GroupOptions(
            nodes=1,
            partition=options.partition,
            cpus_per_task=options.cpus,
            mem=options.mem or CONTROLLER_MEM,
        )
        group = self._group("controller", base, 1, 1, 1, 0)
        group.sbatch += options.sbatch
        group.constraint = None  # the site's constraint is about GPU nodes
        return group

    def _mem(self, options: GroupOptions, gpus: int) -> str | None:
        """The recipe's; else the site's memory of a node, or the share that belongs to `gpus` of its GPUs.
        In an allocation that exists all steps share what it has: srun refuses a step that asks for more."""
        if self.here or options.mem is not None:
            return None if self.here else options.mem
        mem = self.site.mem.per_node
        match = re.match(r"([0-9]+)([KMGT]?)\Z", mem or "")
        if match is None or not gpus or gpus >= self.site_gpus or int(match[1]) == 0:
            return mem
        units = {"K": 2**-10, "": 1.0, "M": 1.0, "G": 2.0**10, "T": 2.0**20}
        return f"{max(1, int(int(match[1]) * units[match[2]] * gpus / self.site_gpus))}M"

    def _share(self, groups: list[Group]) -> None:
        """One allocation: all roles on one node where they fit, else node after node."""
        for group in groups:
            group.component = 0
        needed = sum(group.gpus_per_node for group in groups)
        fits = not self.site_gpus or needed <= self.site_gpus
        together = fits and all(group.nodes == 1 for group in groups)
        if not together:
            first = 0
            for group in groups:
                group.first_node = first
                first += group.nodes
        partitions = {group.partition for group in groups}
        if len(partitions) > 1:
            names = ", ".join(str(name) for name in sorted(partitions, key=str))
            text = f"placement shared is one allocation in one partition, not {names}; use het"
            self._bad(text, "cluster", "placement")

    def _localise(self, groups: list[Group]) -> None:
        """One machine, no components; its GPUs are split between the roles."""
        needed = sum(group.gpus_per_node for group in groups)
        if self.site_gpus and needed > self.site_gpus:
            parts = ", ".join(f"{group.role} {group.gpus_per_node}" for group in groups)
            self._bad(
                f"this machine has {self.site_gpus} GPUs but {needed} are needed ({parts}); "
                "use fewer ranks or replicas, or set gpus_per_node: 0 for a role that runs on the CPU",
                "cluster",
                "placement",
            )

    def _fill_cpus(self, groups: list[Group]) -> None:
        """CPUs per task where the recipe does not say; then: do they fit on a node?"""
        for group in groups:
            group.cpus_per_task = group.cpus_per_task or self._cpus(group, groups)
        if self.problems or self.placement != "het" or not self.site_cpus:
            return
        for group in groups:
            if group.tasks_per_node * group.cpus_per_task > self.site_cpus:
                self._bad(
                    f"{group.tasks_per_node} tasks x {group.cpus_per_task} CPUs do not fit the site's "
                    f"{self.site_cpus} CPUs per node; set cluster.{group.role}.cpus_per_task",
                    "cluster", str(group.role),
                )  # fmt: skip

    def _cpus(self, group: Group, groups: list[Group]) -> int:
        """By GPU where the group has any, else an equal share of a node."""
        if group.gpus_per_task and self.site.cpus.per_gpu:
            return self.site.cpus.per_gpu * group.gpus_per_task
        if not self.site_cpus:
            return 1
        if group.gpus_per_task and self.site_gpus:
            return max(1, self.site_cpus * group.gpus_per_task // self.site_gpus)
        neighbours = [group]
        if self.placement != "het":
            end = group.first_node + group.nodes
            neighbours = [
                g for g in groups if g.first_node < end and group.first_node < g.first_node + g.nodes
            ]
        return max(1, self.site_cpus // sum(g.tasks_per_node for g in neighbours))


def _of_role(by_role: Mapping[RoleName, T], role: Role) -> T | None:
    """What the site says for `role`; where it says nothing of a group that serves models, for rollouts."""
    if role in SCORING_ROLES and role not in by_role:
        return by_role.get("rollout")
    return by_role.get(role)
