"""`hpc-rl logs`: the log files of a run, one after the other, or all of them as they grow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hpc_rl.cli._tail import Follower
    from hpc_rl.run.paths import RunDir

POLL_S = 0.5
STATE_EVERY_S = 5.0


def logs(
    run: str = typer.Argument(..., help="Run directory, recipe name (its latest run) or Slurm job id."),
    follow: bool = typer.Option(False, "-f", "--follow", help="Go on with new lines until the run ends."),
    role: str | None = typer.Option(
        None, "--role", help="controller, policy, rollout, reward, batch, …, or one process: policy_0."
    ),
    attempt: int | None = typer.Option(None, "--attempt", min=1, help="An earlier attempt; default: latest."),
    lines: int = typer.Option(20, "-n", "--lines", min=0, help="Lines shown of each file's end."),
) -> None:
    """Show the ends of a run's log files; with -f, follow them over requeues until the run ends.

    \b
    Example:
      hpc-rl logs gsm8k-grpo -f --role controller
      hpc-rl logs 123456 --role policy_0 -n 100
    """
    from hpc_rl.cli._console import note
    from hpc_rl.cli._tail import Follower, last_lines, log_files
    from hpc_rl.cli.errors import UserError
    from hpc_rl.run.index import find_run

    found = find_run(run)
    folder = found.attempt_logs(attempt) if attempt else found.logs / "latest"
    if attempt and not folder.is_dir():
        known = sorted(path.name.removeprefix("attempt_") for path in found.logs.glob("attempt_*"))
        raise UserError(f"{found.root} has no attempt {attempt}; attempts: {', '.join(known) or 'none yet'}")
    # Before the first attempt there is only what the supervisor said while it started.
    folder = folder.resolve() if folder.is_dir() else found.logs
    files = log_files(folder, role)
    if not files and not follow:
        there = ", ".join(path.stem for path in log_files(folder, None)) or "no logs yet"
        raise UserError(f"no log of {role or 'any role'} in {folder}; there is: {there}")
    follower = Follower()
    for path in files:
        ends, offset = last_lines(path, lines)
        follower.start_at(path, offset)
        if len(files) > 1:
            print(f"==> {path.name} <==")
        for line in ends:
            print(line)
    if not follow:
        return
    try:
        _follow(found, folder, role, attempt, follower)
    except KeyboardInterrupt:
        note("")  # the terminal's ^C has a line of its own


def _follow(run: RunDir, folder: Path, role: str | None, attempt: int | None, follower: Follower) -> None:
    """Print new lines until the run has ended and all is read. A new attempt's folder is picked up."""
    from hpc_rl.cli._console import note
    from hpc_rl.cli._state import ENDED, run_status
    from hpc_rl.cli._tail import log_files

    asked, ended, told = -STATE_EVERY_S, False, False
    while True:
        latest = run.logs / "latest"
        current = folder if attempt or not latest.is_dir() else latest.resolve()
        if current != folder:
            note(f"--- {current.name} ---")
            folder = current
        files, quiet = log_files(folder, role), True
        for path, line in follower.new_lines(files):
            quiet = False
            print(f"[{path.stem}] {line}" if len(files) > 1 else line, flush=True)
        if ended and quiet:
            return
        if time.monotonic() - asked > STATE_EVERY_S:
            status = run_status(run, live=False)
            asked, ended = time.monotonic(), status.state in ENDED
            if status.state == "PENDING" and not told:  # a queue may take days: silence looks like a fault
                told = True
                note(f"waiting for the job to start ({status.reason or status.state})")
        if quiet and not ended:
            time.sleep(POLL_S)
