"""`hpc-rl list`: the runs that this user has started, newest last."""

from __future__ import annotations

from pathlib import Path

import typer


def list_runs(
    name: str | None = typer.Argument(None, help="Only runs of this recipe name."),
    root: list[Path] = typer.Option([], "--root", help="Also look under this output root."),
    count: int = typer.Option(30, "-n", "--count", min=1, help="At most this many, the newest."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list."),
) -> None:
    """List runs: those in your index, and those under ./runs and every --root.

    \b
    Example:
      hpc-rl list
      hpc-rl list gsm8k-grpo --json
    """
    from hpc_rl.cli._console import ago, note, print_json, table
    from hpc_rl.cli._jobs import ask_jobs
    from hpc_rl.cli._state import run_status
    from hpc_rl.cli.errors import UserError
    from hpc_rl.run.attempts import latest_job
    from hpc_rl.run.index import known_runs
    from hpc_rl.run.paths import RunError
    from hpc_rl.telemetry.console import step_name

    runs, jobs, found = [], [], []
    for run in [run for run in known_runs(["runs", *root]) if name is None or run.name == name][-count:]:
        try:
            job = latest_job(run)
        except RunError as error:
            note(f"warning: {error}")
            continue
        runs.append(run)
        jobs += [job.job_id] if job is not None and job.job_id else []
    views = ask_jobs(jobs)  # one question to Slurm for all of them
    for run in runs:
        try:
            found.append(run_status(run, views=views, live=False))
        except RunError as error:  # one damaged run does not hide the others
            note(f"warning: {error}")
    if as_json:
        print_json([answer.as_json() for answer in found])
        return
    if not found:
        known = sorted({run.name for run in known_runs(["runs", *root])}) if name is not None else []
        if known:
            raise UserError(f"no run is named {name!r}; known names: {', '.join(known)}")
        note("no runs yet; start one with: hpc-rl submit RECIPE")
        return
    rows = [
        [
            a.run,
            a.job_id or "-",
            a.state,
            step_name(a.step or 0, a.total_steps),
            a.attempt,
            ago(a.submitted),
            a.run_dir,
        ]
        for a in found
    ]
    typer.echo(table(["run", "job", "state", "step", "attempt", "age", "directory"], rows))
