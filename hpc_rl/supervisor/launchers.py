"""Starting role steps: as child processes (`local`) or with `srun` (Slurm).

Both start the same command, `python -m MODULE RUN_DIR --attempt N --incarnation I ...`; roles cannot
tell the difference but for where their index comes from.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from hpc_rl.cluster.environment import role_environment, step_environment
from hpc_rl.cluster.slurm.steps import role_python, step_argv
from hpc_rl.plan.schema import Group, Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from hpc_rl.supervisor.steps import ProcessStep, SlurmStep, Step, spawn

# The program of each role. They are started by name and never imported here.
MODULES: Mapping[str, str] = {
    "controller": "hpc_rl.controller",
    "policy": "hpc_rl.policy",
    "rollout": "hpc_rl.rollout",
    "reward": "hpc_rl.scoring.reward",
    "teacher": "hpc_rl.scoring.teacher",
}


class LaunchError(ValueError):
    """The controller asked for a step that cannot be started."""


class Launcher(Protocol):
    def start(self, role: str, index: int, incarnation: int) -> Step:
        """Start the step of `role` (`index`: the replica). Raises LaunchError or OSError."""


def role_command(
    modules: Mapping[str, str], run: RunDir, role: str, attempt: int, incarnation: int, python: str
) -> list[str]:
    """The command of one role process, without its index."""
    if role not in modules:
        raise LaunchError(f"role {role!r} has no program; known: {', '.join(sorted(modules))}")
    return [
        python,
        "-u",
        "-m",
        modules[role],
        str(run.root),
        "--attempt",
        str(attempt),
        "--incarnation",
        str(incarnation),
    ]


def group_of(plan: Plan, role: str) -> Group:
    try:
        return plan.group(role)
    except KeyError as error:
        raise LaunchError(str(error)) from error


class Environments:
    """The environment of each role's processes: this one's, cleaned, with the role's variables set."""

    def __init__(self, plan: Plan, recipe: Recipe) -> None:
        self._plan = plan
        self._recipe = recipe
        self.site = Site.model_validate(plan.site_profile)

    def variables(self, role: str) -> dict[str, str]:
        """Raises LaunchError if the plan has no such role."""
        group_of(self._plan, role)
        return role_environment(self._plan, self.site, self._recipe, role)

    def of(self, role: str, *, runtime: str = "none") -> dict[str, str]:
        return step_environment(
            os.environ, self.variables(role), secrets=self._recipe.cluster.secrets, runtime=runtime
        )

    def of_controller(self) -> dict[str, str]:
        """Without a group of its own the controller gets what the first group gets (the policy, if there is
        one), on whose first node it runs, but for its own variables."""
        if any(group.role == "controller" for group in self._plan.groups):
            return self.of("controller")
        stand_in = self._plan.groups[0].model_copy(update={"role": "controller", "variables": {}})
        plan = self._plan.model_copy(update={"groups": [stand_in]})
        return Environments(plan, self._recipe).of("controller")


class _PlanLauncher:
    """What both launchers know: the run, its plan, and the environment of each role."""

    def __init__(
        self, run: RunDir, plan: Plan, recipe: Recipe, attempt: int, *, modules: Mapping[str, str] = MODULES
    ) -> None:
        self._run = run
        self._plan = plan
        self._attempt = attempt
        self._modules = modules
        self._environments = Environments(plan, recipe)

    def _command(self, role: str, incarnation: int, python: str) -> list[str]:
        return role_command(self._modules, self._run, role, self._attempt, incarnation, python)

    def _log(self, role: str, task: int | str) -> Path:
        return self._run.attempt_logs(self._attempt) / f"{role}_{task}.log"


class LocalLauncher(_PlanLauncher):
    """Roles as child processes of the supervisor, on this machine."""

    def start(self, role: str, index: int, incarnation: int) -> Step:
        """The policy's step is all its ranks; a rollout step is the one replica `index`."""
        group = group_of(self._plan, role)
        command = self._command(role, incarnation, sys.executable)
        tasks = list(range(group.tasks)) if role == "policy" else [index]
        option = "--rank" if role == "policy" else "--replica"
        logs = [self._log(role, task) for task in tasks]
        # Each process would take every core for itself; the user's own setting wins.
        defaults = {"OMP_NUM_THREADS": str(group.cpus_per_task)}
        environment = {**defaults, **self._environments.of(role)}
        children: list[subprocess.Popen[bytes]] = []
        try:
            for task, log in zip(tasks, logs, strict=True):
                env = {**environment, **self._devices(group, task)}
                children.append(spawn([*command, option, str(task)], log, env, self._run.root))
        except OSError:
            ProcessStep(role, index, incarnation, command, logs, children).kill()
            raise
        return ProcessStep(role, index, incarnation, command, logs, children)

    def _devices(self, group: Group, task: int) -> dict[str, str]:
        """The GPUs of a task, counted through the groups in the plan's order."""
        if group.gpus_per_task == 0:
            return {}
        first = task * group.gpus_per_task
        for other in self._plan.groups:
            if other.role == group.role:
                break
            first += other.tasks * other.gpus_per_task
        devices = range(first, first + group.gpus_per_task)
        return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}


class SlurmLauncher(_PlanLauncher):
    """Roles as job steps of the allocation: one `srun` for the policy, one per replica."""

    def start(self, role: str, index: int, incarnation: int) -> Step:
        """`srun` itself is the child; what it says of the step goes to a log of its own."""
        group = group_of(self._plan, role)
        site = self._environments.site
        command = self._command(role, incarnation, role_python(site, group, sys.executable))
        if role != "policy":
            command += ["--replica", str(index)]
        variables = self._environments.variables(role)
        runtime = site.container.runtime if group.image is not None else "none"
        argv = step_argv(
            self._plan,
            site,
            role,
            index,
            command,
            self._log(role, "%t" if role == "policy" else index),
            run_dir=self._run.root,
            incarnation=incarnation,
            variables=variables.keys(),
        )
        own_log = self._log(f"srun_{role}", index)
        child = spawn(argv, own_log, self._environments.of(role, runtime=runtime), self._run.root)
        tasks = range(group.tasks) if role == "policy" else [index]
        logs = [own_log, *(self._log(role, task) for task in tasks)]
        return SlurmStep(role, index, incarnation, argv, logs, [child])
