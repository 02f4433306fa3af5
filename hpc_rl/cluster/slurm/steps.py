"""The srun command line of one role step. Pure: the same plan gives the same words.

Nothing is left to srun's defaults, which it takes from the environment and which differ between
versions. Values of variables travel in the environment of srun, never on its command line.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from hpc_rl.cluster.slurm.components import gpu_option, megabytes
from hpc_rl.plan.schema import Group, Plan
from hpc_rl.plan.site import Site


def step_argv(
    plan: Plan,
    site: Site,
    role: str,
    index: int,
    command: Sequence[str],
    log_path: Path,
    *,
    run_dir: Path,
    incarnation: int = 0,
    variables: Collection[str] = (),
) -> list[str]:
    """srun for the step of `role`: all ranks of the policy, or process `index` of any other role.

    `log_path` is opened for appending by the tasks; `%t` in its last part becomes the rank.
    `variables` are the names of the role's environment, which a container takes from the host.
    Raises ValueError if the plan has no such step.
    """
    group = plan.group(role)
    argv = ["srun", "--kill-on-bad-exit=1", "--input=none", "--unbuffered", "--export=ALL", "--mpi=none"]
    if _components(plan) > 1:
        argv.append(f"--het-group={group.component}")
    argv.append(f"--job-name={_step_name(role, index, incarnation)}")
    argv += _shape(plan, group, index)
    argv += _resources(plan, site, group)
    argv += [f"--output={_pattern(log_path)}", "--open-mode=append", f"--chdir={run_dir}"]
    image = group.image
    if site.container.runtime == "none" or image is None:
        return [*argv, *command]
    mounts = _mounts(site, run_dir)
    if site.container.runtime == "pyxis":
        return [*argv, *_pyxis(site, image, mounts, run_dir, variables), *command]
    return [*argv, *_apptainer(site, group, image, mounts, run_dir), *command]


def role_python(site: Site, group: Group, host_python: str) -> str:
    """The interpreter for a role: the image's `container.python`, else the site's, else `host_python`."""
    if site.container.runtime != "none" and group.image is not None:
        return site.container.python
    return site.python or host_python


def _components(plan: Plan) -> int:
    return len({group.component for group in plan.groups})


def _step_name(role: str, index: int, incarnation: int) -> str:
    """`policy.1`, `rollout-3.0`: what `squeue -s` and sacct show; after the dot stand restarts."""
    return f"{role}.{incarnation}" if role == "policy" else f"{role}-{index}.{incarnation}"


def _shape(plan: Plan, group: Group, index: int) -> list[str]:
    """Nodes and tasks. Ranks are numbered node after node (`--distribution=block`)."""
    if group.role == "policy":
        shape = [
            f"--nodes={group.nodes}",
            f"--ntasks={group.tasks}",
            f"--ntasks-per-node={group.tasks_per_node}",
            "--distribution=block",
        ]
        first = group.first_node
    else:
        if not 0 <= index < group.tasks:
            raise ValueError(f"{group.role} {index}: the plan has {group.tasks} of them")
        if group.gpus_per_task > group.gpus_per_node:
            raise ValueError(f"{group.role}: {group.gpus_per_task} GPUs of one replica must be on one node")
        shape = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
        first = group.first_node + index // group.tasks_per_node
    if plan.placement == "shared":
        # One allocation holds several groups: each step is put onto its group's nodes.
        shape.append(f"--relative={first}")
    return shape


def _resources(plan: Plan, site: Site, group: Group) -> list[str]:
    """CPUs, memory and GPUs of this step alone (`--exact`), so that steps on one node start at once.

    Memory 0 shares the job's memory and is charged to no step.
    """
    argv = ["--exact", f"--cpus-per-task={group.cpus_per_task}"]
    total = megabytes(group.mem) if group.mem is not None else 0
    alone = group.role == "policy" or total == 0
    argv.append("--mem=0" if alone else f"--mem={total // group.tasks_per_node}M")
    count = group.gpus_per_node if group.role == "policy" else group.gpus_per_task
    asked = gpu_option(site, count)
    if asked is not None:
        argv.append(f"--{asked[0]}={asked[1]}")
    elif any(gpu_option(site, other.gpus_per_node) for other in plan.groups):
        argv.append("--gres=none")  # a step takes all GPUs of the allocation unless told otherwise
    return argv


def _pattern(log_path: Path) -> str:
    """srun's file name pattern: a `%` in a folder's name is not one of its codes."""
    return f"{str(log_path.parent).replace('%', '%%')}/{log_path.name}"


def _mounts(site: Site, run_dir: Path) -> list[str]:
    """The site's mounts, and what every role needs at its own path: run, model cache, local disk."""
    mounts = list(site.container.mounts)
    needed = [str(run_dir), site.paths.hf_home, site.paths.local]
    for path in needed:
        if path is None:
            continue
        path = os.path.expandvars(path)
        if not any(_covers(mount, path) for mount in mounts):
            mounts.append(f"{path}:{path}")
    for mount in mounts:
        if "," in mount:
            raise ValueError(f"a container cannot mount {mount!r}: the runtime separates mounts by commas")
    return mounts


def _covers(mount: str, path: str) -> bool:
    """Whether `path` is inside a mount whose two sides are the same."""
    parts = mount.split(":")
    source, target = parts[0].rstrip("/"), (parts[1] if len(parts) > 1 else parts[0]).rstrip("/")
    return source == target and (path == source or path.startswith(f"{source}/"))


def _pyxis(site: Site, image: str, mounts: list[str], run_dir: Path, variables: Collection[str]) -> list[str]:
    argv = [
        f"--container-image={image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={run_dir}",
        "--no-container-mount-home",
    ]
    if variables:
        argv.append(f"--container-env={','.join(sorted(variables))}")
    return [*argv, *site.container.args]


def _apptainer(site: Site, group: Group, image: str, mounts: list[str], run_dir: Path) -> list[str]:
    argv = ["apptainer", "exec", "--no-home"]
    if group.gpus_per_task:
        argv.append("--nv")
    argv += [f"--bind={mount}" for mount in mounts]
    return [*argv, f"--pwd={run_dir}", *site.container.args, image]
