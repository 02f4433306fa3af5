"""What Slurm says of the runs' jobs, or nothing where it cannot be asked."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_rl.cluster.slurm.commands import SlurmError
from hpc_rl.cluster.slurm.states import JobState
from hpc_rl.cluster.slurm.watcher import job_states

__all__ = ["JobState", "ask_jobs"]


def ask_jobs(job_ids: Sequence[str]) -> dict[str, JobState]:
    """The jobs that Slurm still knows, by leader id; empty without Slurm (the run directory answers)."""
    if not job_ids:
        return {}
    try:
        return job_states(job_ids)
    except SlurmError:
        return {}
