"""The state of jobs, asked of squeue, then scontrol, then sacct; and the few things done to a job.

squeue knows pending, running and just-ended jobs on every cluster, scontrol keeps ended ones for
MinJobAge (300 s by default), sacct keeps them for good where accounting is on.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpc_rl.cluster.slurm.commands import SlurmError, check_slurm, run_slurm
from hpc_rl.cluster.slurm.states import (
    SACCT_FORMAT,
    SQUEUE_FORMAT,
    JobState,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
    with_restarts,
)

_UNKNOWN_JOB = "invalid job id"
_COMMENT_LENGTH = 200


def job_states(job_ids: Sequence[str | int]) -> dict[str, JobState]:
    """The states of many jobs with one squeue, and one sacct for what squeue has forgotten.

    Keys are leader ids as given; a job that nothing knows any more (ended, no accounting) is absent.
    Raises SlurmMissing without a Slurm client and SlurmError if the controller does not answer.
    """
    wanted = list(dict.fromkeys(str(job_id) for job_id in job_ids))
    if not wanted:
        return {}
    found = _squeue(wanted)
    for job_id, job in list(found.items()):
        if job.state == "PENDING" and job_id in wanted:
            found[job_id] = with_restarts(job, _restarts(job_id))
    missing = [job_id for job_id in wanted if job_id not in found]
    if missing:
        found.update(_sacct(missing))
    for job_id in [job_id for job_id in missing if job_id not in found]:
        found.update(_scontrol(job_id))
    return {job_id: found[job_id] for job_id in wanted if job_id in found}


def job_state(job_id: str | int) -> JobState | None:
    """The state of one job; None if Slurm remembers nothing of it."""
    return job_states([job_id]).get(str(job_id))


def cancel_job(job_id: str | int) -> None:
    """End every component of the job, pending or running. A job that has ended is no error."""
    done = run_slurm(["scancel", str(job_id)])
    if done.returncode and _UNKNOWN_JOB not in done.stderr.lower():
        raise SlurmError(f"scancel {job_id} failed: {done.stderr.strip()}")


def signal_supervisor(job_id: str | int, signal_name: str) -> None:
    """Send a signal (`USR2`) to the batch step alone, which is the supervisor."""
    check_slurm(["scancel", "--batch", f"--signal={signal_name}", str(job_id)])


def set_comment(job_id: str | int, text: str) -> None:
    """Show `text` in `squeue -o %k`; cut to 200 characters, on one line."""
    line = " ".join(text.split())[:_COMMENT_LENGTH]
    check_slurm(["scontrol", "update", f"JobId={job_id}", f"Comment={line}"])


def requeue(job_id: str | int) -> None:
    """Requeue the whole job by its leader. Slurm ends all its steps at once: save before.

    Raises SlurmError if the job is not requeueable.
    """
    check_slurm(["scontrol", "requeue", str(job_id)])


def time_left(job_id: str | int) -> int | None:
    """Seconds until the job's time limit; None if it is not running or has no limit."""
    job = _squeue([str(job_id)]).get(str(job_id))
    if job is None or job.state != "RUNNING":
        return None
    return job.components[0].time_left_s


def _squeue(job_ids: Sequence[str]) -> dict[str, JobState]:
    argv = ["squeue", "-h", "-t", "all", "-o", SQUEUE_FORMAT, "-j", ",".join(job_ids)]
    done = run_slurm(argv)
    if done.returncode and _UNKNOWN_JOB not in done.stderr.lower():
        raise SlurmError(f"squeue failed: {done.stderr.strip()}")
    return parse_squeue(done.stdout)


def _scontrol(job_id: str) -> dict[str, JobState]:
    done = run_slurm(["scontrol", "-o", "show", "job", job_id])
    return parse_scontrol(done.stdout) if done.returncode == 0 else {}


def _restarts(job_id: str) -> int:
    job = _scontrol(job_id).get(job_id)
    return job.restarts if job else 0


def _sacct(job_ids: Sequence[str]) -> dict[str, JobState]:
    argv = ["sacct", "-n", "-P", "-X", "-o", SACCT_FORMAT, "-j", ",".join(job_ids)]
    done = run_slurm(argv)
    # A non-zero exit here means that accounting is off or unreachable: what it knew is simply not known.
    return parse_sacct(done.stdout) if done.returncode == 0 else {}
