"""`hpc-rl cancel`: end a run at once, or let it save first."""

from __future__ import annotations

import getpass
import json
import socket
import time
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hpc_rl.run.paths import RunDir

GONE_S = 20.0


def cancel(
    run: str = typer.Argument(..., help="Run directory, recipe name (its latest run) or Slurm job id."),
    save: bool = typer.Option(False, "--save", help="Finish the step, write a checkpoint, then end."),
    timeout: float = typer.Option(900.0, "--timeout", min=1, help="Seconds that --save may take."),
) -> None:
    """End a run. It is never requeued by this; `hpc-rl resume` continues it from its last checkpoint.

    \b
    Example:
      hpc-rl cancel gsm8k-grpo
      hpc-rl cancel 123456 --save
    """
    from hpc_rl.cli._console import note
    from hpc_rl.cli._state import ENDED, run_status
    from hpc_rl.cli.errors import UserError
    from hpc_rl.cluster.local.start import cancel_local
    from hpc_rl.run.attempts import latest_job
    from hpc_rl.run.index import find_run

    found = find_run(run)
    job, status = latest_job(found), run_status(found, live=False)
    if job is None or status.state in ENDED:
        note(f"{found.root} has ended already: {status.state}")
        return
    _remember(found, status.attempt, save)
    if save and status.state == "RUNNING":
        _save_and_stop(found, timeout)
        return
    if save:
        note(f"the run is {status.state}: there is nothing new to save")
    if job.job_id is not None and not job.here:
        _cancel_job(job.job_id)
    elif not cancel_local(found):
        raise UserError(f"the supervisor did not end on SIGKILL; look at process {job.pid}")
    print(f"cancelled {found.root}; continue it with: hpc-rl resume {found.root}")


def _remember(run: RunDir, attempt: int, save: bool) -> None:
    """So that `status` can tell a cancelled run from one whose supervisor was lost."""
    from hpc_rl.run.events import EventLog

    EventLog(run, attempt).append("cancel", save=save, user=getpass.getuser(), host=socket.gethostname())


def _save_and_stop(run: RunDir, timeout: float) -> None:
    from hpc_rl.cli._console import note
    from hpc_rl.cli._follow import watch
    from hpc_rl.cli._state import ENDED
    from hpc_rl.cli.errors import UserError
    from hpc_rl.run.paths import write_private

    request = run.control / "stop.json"
    write_private(request, json.dumps({"action": "save_and_stop", "time": time.time()}).encode())
    note("asked the run to save and stop at the next step (Ctrl-C leaves it to it)")
    try:
        status = watch(run, lambda status: status.state in ENDED, deadline_s=timeout)
    except KeyboardInterrupt:
        note("the request stands; see: hpc-rl status " + str(run.root))
        return
    if status.state not in ENDED:
        raise UserError(
            f"the run has not stopped within {timeout:.0f} s (at step {status.step}); the request stands. "
            f"Without saving: hpc-rl cancel {run.root}"
        )
    saved = f"checkpoint of step {status.checkpoint}" if status.checkpoint is not None else "no checkpoint"
    print(f"{status.state} with {saved}; continue it with: hpc-rl resume {run.root}")


def _cancel_job(job_id: str) -> None:
    """scancel, and wait until Slurm says that every component is gone."""
    from hpc_rl.cli.errors import UserError
    from hpc_rl.cluster.slurm.watcher import cancel_job, job_state

    cancel_job(job_id)
    end = time.monotonic() + GONE_S
    while time.monotonic() < end:
        job = job_state(job_id)
        if job is None or all(
            c.slurm_state not in ("RUNNING", "COMPLETING", "PENDING") for c in job.components
        ):
            return
        time.sleep(0.5)
    raise UserError(f"job {job_id} is still there {GONE_S:.0f} s after scancel; see: squeue -j {job_id}")
