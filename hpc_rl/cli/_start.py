"""Starting a prepared run: as a Slurm job through submitit, in this allocation, or on this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.cli._prepare import Prepared
from hpc_rl.cli.errors import UserError
from hpc_rl.run.attempts import read_attempts, record_job
from hpc_rl.run.paths import RunDir


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
    from hpc_rl.cluster.slurm.submit import job_folder, job_script

    run = RunDir(run_dir)
    try:
        script = job_script(prepared.recipe, prepared.plan, prepared.site, run)
        return script.render(job_folder(run, 1))
    except ValueError as error:
        raise UserError(str(error)) from error


def _sbatch(run: RunDir, prepared: Prepared, attempt: int) -> str:
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch is not on PATH: this machine has no Slurm client; log in to a node of the cluster, or "
            "run without Slurm: cluster.placement=local"
        )
    from hpc_rl.cluster.slurm.submit import job_script, submit_job

    try:
        script = job_script(prepared.recipe, prepared.plan, prepared.site, run, attempt=attempt)
        return submit_job(script, run, attempt=attempt)
    except ValueError as error:
        raise UserError(str(error)) from error


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
    have, nodes = int(environ.get("SLURM_JOB_NUM_NODES") or 1), max(group.nodes for group in groups)
    if have < nodes:
        raise UserError(f"the allocation has {have} nodes, the plan needs {nodes}: {_wanted(prepared)}")


def _wanted(prepared: Prepared) -> str:
    parts = [f"{g.role}: {g.nodes} nodes, {g.tasks} tasks" for g in prepared.plan.groups]
    return "; ".join(parts)
