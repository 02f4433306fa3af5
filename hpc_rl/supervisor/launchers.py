"""Starting role steps: as child processes (`local`) or with `srun` (Slurm).

Both start the same command, `python -m MODULE RUN_DIR --attempt N --incarnation I ...`; roles cannot
tell the difference but for where their index comes from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from hpc_rl.plan.schema import Group, Plan
from hpc_rl.run.paths import RunDir
from hpc_rl.supervisor.steps import ProcessStep, Step, spawn

# The program of each role. They are started by name and never imported here.
MODULES: Mapping[str, str] = {
    "controller": "hpc_rl.controller",
    "policy": "hpc_rl.policy",
    "rollout": "hpc_rl.rollout",
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


class LocalLauncher:
    """Roles as child processes of the supervisor, on this machine."""

    def __init__(
        self, run: RunDir, plan: Plan, attempt: int, *, modules: Mapping[str, str] = MODULES
    ) -> None:
        self._run = run
        self._plan = plan
        self._attempt = attempt
        self._modules = modules

    def start(self, role: str, index: int, incarnation: int) -> Step:
        """The policy's step is all its ranks; a rollout step is the one replica `index`."""
        group = group_of(self._plan, role)
        command = role_command(self._modules, self._run, role, self._attempt, incarnation, sys.executable)
        indices = [index] if role == "rollout" else list(range(group.tasks))
        option = "--replica" if role == "rollout" else "--rank"
        children = []
        try:
            for task in indices:
                env = {**os.environ, **group.variables, **self._devices(group, task)}
                children.append(spawn([*command, option, str(task)], self._log(role, task), env))
        except OSError:
            for child in children:
                child.kill()
                child.wait()
            raise
        return ProcessStep(role, index, incarnation, command, self._log(role, indices[0]), children)

    def _log(self, role: str, index: int) -> Path:
        return self._run.attempt_logs(self._attempt) / f"{role}_{index}.log"

    def _devices(self, group: Group, task: int) -> dict[str, str]:
        """The GPUs of a task, counted through the groups in the plan's order, and its CPU threads."""
        threads = {"OMP_NUM_THREADS": str(group.cpus_per_task)}
        if group.gpus_per_task == 0:
            return threads
        first = task * group.gpus_per_task
        for other in self._plan.groups:
            if other.role == group.role:
                break
            first += other.tasks * other.gpus_per_task
        devices = range(first, first + group.gpus_per_task)
        return {**threads, "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))}
