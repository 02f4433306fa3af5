"""HetSlurmExecutor: submitit's Slurm executor, for jobs of several components with different options.

submitit writes the job file, submits and names the job; what differs here is the text of the script
(`script.py`), the environment given to sbatch, and that states come from squeue before sacct.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import submitit
from submitit.core.core import Job
from submitit.core.utils import DelayedSubmission
from submitit.slurm.slurm import SlurmInfoWatcher

from hpc_rl.cluster.environment import submission_environment
from hpc_rl.cluster.slurm.commands import check_slurm
from hpc_rl.cluster.slurm.script import JobScript
from hpc_rl.cluster.slurm.watcher import job_states


class HetInfoWatcher(SlurmInfoWatcher):  # type: ignore[misc]
    """States by leader id, also without accounting (submitit's asks sacct, and misses het ids)."""

    def update(self) -> None:
        wanted = self._registered - self._finished
        for job_id, job in job_states(sorted(wanted)).items():
            self._info_dict[job_id] = {"JobID": job_id, "State": job.state}
            if job.final:
                self._finished.add(job_id)


class HetSlurmJob(submitit.SlurmJob):  # type: ignore[misc]
    """A submitted job; its one task is the batch step of component 0."""

    watcher = HetInfoWatcher(delay_s=30)


class HetSlurmExecutor(submitit.SlurmExecutor):  # type: ignore[misc]
    """Submits one task as the batch step of a (heterogeneous) job.

    `folder` keeps submitit's files of the job and is made private (0700). `secrets` and everything
    called like one are kept out of the job's environment.
    Raises RuntimeError where there is no Slurm client.
    """

    job_class = HetSlurmJob

    def __init__(self, folder: Path, script: JobScript, *, environ: Mapping[str, str] | None = None) -> None:
        super().__init__(folder, max_num_timeout=0, python=script.python)
        self.script = script
        self._environ = dict(os.environ if environ is None else environ)
        self.parameters["time"] = script.plan.time_minutes

    @classmethod
    def name(cls) -> str:
        return "slurm"  # the job's side is submitit's own Slurm environment

    def _num_tasks(self) -> int:
        return 1

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Job[Any]]:
        if len(delayed_submissions) != 1:
            raise ValueError("Slurm has no arrays of heterogeneous jobs; submit one task at a time")
        delayed = delayed_submissions[0]
        delayed.set_timeout(self.script.plan.time_minutes, self.max_num_timeout)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        path = self.folder / f"{uuid.uuid4().hex}.pkl"
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # private before it has content
        try:
            delayed.dump(path)
            job = self._submit_command(self._submitit_command_str)
        except BaseException:
            path.unlink()
            raise
        job.paths.move_temporary_file(path, "submitted_pickle")
        return [job]

    def _submit_command(self, command: str) -> Job[Any]:
        """Write the script and give it to sbatch in a clean environment. Raises SlurmError with its words."""
        text = self._make_submission_file_text(command, "")
        path = self.folder / f"{uuid.uuid4().hex}.sbatch"
        path.write_text(text, encoding="utf-8")
        environ = submission_environment(self._environ, self.script.secrets)
        try:
            output = check_slurm(self._make_submission_command(path), environ=environ)
        except BaseException:
            path.unlink()
            raise
        job = self.job_class(
            folder=self.folder, job_id=self._get_job_id_from_submission_command(output), tasks=[0]
        )
        job.paths.move_temporary_file(path, "submission_file")
        return job

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self.script.render(self.folder, environ=self._environ)
