"""Starting a prepared run: as a Slurm job through submitit, in this allocation, or on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_rl.cli._prepare import Prepared
from hpc_rl.cli.errors import UserError
from hpc_rl.run.attempts import read_attempts, record_job
from hpc_rl.run.paths import RunDir

if TYPE_CHECKING:
    from hpc_rl.cluster.slurm.script import JobScript


@dataclass(frozen=True)
class Started:
    """What `submit` tells: `job_id` of Slurm, or the `pid` of a supervisor on this machine."""

    run_dir: Path
    logs: Path
    job_id: str | None
    pid: int | None = None

    def as_json(self) -> dict[str, object]:
        return {
            "run": self.run_dir.parent.name,
            "run_dir": str(self.run_dir),
            "logs": str(self.logs),
            "job_id": self.job_id,
            "pid": self.pid,
        }


def start(run: RunDir, prepared: Prepared, *, here: bool = False) -> Started:
    """Start the next attempt of `run`. Raises SlurmError with sbatch's own words, or UserError."""
    attempt = len(read_attempts(run)) + 1
    logs = run.open_logs(attempt)
    (run.control / "stop.json").unlink(missing_ok=True)  # a request to an earlier attempt
    placement = prepared.plan.placement
    if placement == "local" or here:
        from hpc_rl.cluster.local.start import start_supervisor

        pid = start_supervisor(run)
        job_id = os.environ.get("SLURM_JOB_ID") if here else None
        record_job(run, job_id, placement, pid=pid, here=here)
        return Started(run.root, logs, job_id, pid)
    job_id = _sbatch(run, prepared, attempt)
    record_job(run, job_id, placement)
    return Started(run.root, logs, job_id)


def script_text(prepared: Prepared, run_dir: Path) -> str:
    """The job script as it would be for `run_dir`, which need not exist. Raises UserError."""
    run = RunDir(run_dir)
    script = job_script(prepared, run, 1)
    try:
        return script.render(job_folder(run, 1))
    except ValueError as error:
        raise UserError(str(error)) from error


def job_script(prepared: Prepared, run: RunDir, attempt: int) -> JobScript:
    """What decides the script of the job that starts with `attempt`. Raises UserError."""
    from hpc_rl.cluster.slurm.script import JobScript

    log = run.attempt_logs(attempt) / "batch.log"
    try:
        return JobScript.of(prepared.recipe, prepared.plan, prepared.site, run_dir=run.root, log=log)
    except ValueError as error:
        raise UserError(str(error)) from error


def job_folder(run: RunDir, attempt: int) -> Path:
    """Where submitit keeps the files of the job that starts with `attempt` (0700)."""
    return run.attempt_logs(attempt) / "submitit"


def _sbatch(run: RunDir, prepared: Prepared, attempt: int) -> str:
    """Submit through submitit; the leader's job id. The script stays in the log folder as job.sbatch."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on PATH: this machine has no Slurm client; log in to a node of the cluster, or "
            "run without Slurm: cluster.placement=local"
        )
    from hpc_rl.cluster.slurm.executor import HetSlurmExecutor
    from hpc_rl.cluster.slurm.task import SupervisorTask

    script, folder = job_script(prepared, run, attempt), job_folder(run, attempt)
    try:
        text = script.render(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    (run.attempt_logs(attempt) / "job.sbatch").write_text(text, encoding="utf-8")
    job = HetSlurmExecutor(folder, script).submit(SupervisorTask(str(run.root)))
    return str(job.job_id)


def allocation_placement(environ: Mapping[str, str] | None = None) -> str:
    """`het` or `shared`, as the allocation that we are in is. Raises UserError outside of one."""
    environ = os.environ if environ is None else environ
    if not environ.get("SLURM_JOB_ID"):
        raise UserError(
            "--here needs a Slurm allocation, and SLURM_JOB_ID is not set; get one with salloc first"
        )
    return "het" if int(environ.get("SLURM_HET_SIZE") or 1) > 1 else "shared"


def check_allocation(prepared: Prepared, environ: Mapping[str, str] | None = None) -> None:
    """The allocation has the components and nodes that the plan needs. Raises UserError."""
    environ = os.environ if environ is None else environ
    groups = [group for group in prepared.plan.groups if group.component is not None]
    if prepared.plan.placement == "het":
        size, needed = int(environ.get("SLURM_HET_SIZE") or 1), len({group.component for group in groups})
        if size != needed:
            raise UserError(
                f"the allocation has {size} components, the plan needs {needed}: {_wanted(prepared)}"
            )
        for group in groups:
            have = int(environ.get(f"SLURM_JOB_NUM_NODES_HET_GROUP_{group.component}") or 0)
            if have and have < group.nodes:
                raise UserError(
                    f"component {group.component} ({group.role}) has {have} nodes, not {group.nodes}"
                )
        return
    have = int(environ.get("SLURM_JOB_NUM_NODES") or 1)
    nodes = max(group.first_node + group.nodes for group in groups)
    if have < nodes:
        raise UserError(f"the allocation has {have} nodes, the plan needs {nodes}: {_wanted(prepared)}")


def _wanted(prepared: Prepared) -> str:
    parts = [f"{g.role}: {g.nodes} nodes, {g.tasks} tasks" for g in prepared.plan.groups]
    return "; ".join(parts)
