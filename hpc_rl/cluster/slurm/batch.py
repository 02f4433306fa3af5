"""`python -m hpc_rl.cluster.slurm.batch FOLDER`: submitit's job entry, behind a check of the job file.

submitit unpickles `<job id>_submitted.pkl`. This is the one pickle that hpc-rl lets be read, so it must
lie in a folder that only this user can write, belong to this user and have mode 0600.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path

from submitit.core.submission import process_job
from submitit.core.utils import JobPaths

_WAIT_S = 60.0  # the file gets its name when sbatch has told the job id, which the job can outrun


def check_job_file(folder: Path, job_id: str, wait_s: float = _WAIT_S) -> Path:
    """The job file of `job_id` once it is there. Raises PermissionError or TimeoutError with the reason."""
    _check_owner(folder.lstat(), folder, 0o022, "must be writable by you alone (chmod 700)")
    pickle = JobPaths(folder, job_id=job_id).submitted_pickle
    end = time.monotonic() + wait_s
    while not pickle.exists():
        if time.monotonic() > end:
            raise TimeoutError(
                f"waited {wait_s:g} s for submitit's job file {pickle}; was the submission killed?"
            )
        time.sleep(0.2)
    _check_owner(pickle.lstat(), pickle, 0o077, "must have mode 0600")
    return pickle


def _check_owner(status: os.stat_result, path: Path, forbidden: int, rule: str) -> None:
    link = stat.S_ISLNK(status.st_mode)
    if link or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & forbidden:
        raise PermissionError(
            f"{path} {rule}: owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}"
            f"{', a link' if link else ''}; nothing was read from it"
        )


def main() -> None:
    """Check, clear what an earlier attempt of the same job left, and hand over to submitit."""
    folder, job_id = Path(sys.argv[1]), os.environ["SLURM_JOB_ID"]
    check_job_file(folder, job_id)
    result = JobPaths(folder, job_id=job_id, task_id=0).result_pickle
    # An attempt that was killed while writing it would make submitit fail at the end of this one.
    result.with_suffix(result.suffix + ".save_tmp").unlink(missing_ok=True)
    result.unlink(missing_ok=True)
    process_job(folder)


if __name__ == "__main__":
    main()
