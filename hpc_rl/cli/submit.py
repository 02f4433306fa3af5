"""`hpc-rl submit`: check a recipe, make its run directory, and start it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hpc_rl.cli._prepare import Prepared
    from hpc_rl.cli._start import Started
    from hpc_rl.run.paths import RunDir


def submit(
    recipe: str = typer.Argument(..., help="A recipe file, or the name of a shipped recipe."),
    overrides: list[str] = typer.Argument(
        None, metavar="[a.b=value]...", help="Keys to change for this run."
    ),
    site: str | None = typer.Option(None, "--site", help="Site profile: a name or a file (cluster.site)."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print plan, recipe and script; write nothing."),
    follow: bool = typer.Option(False, "--follow", help="Watch the run to its end; Ctrl-C detaches."),
    here: bool = typer.Option(False, "--here", help="Run inside this Slurm allocation (salloc)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Check a recipe, make its run directory and start it: as a Slurm job, or here without Slurm.

    Prints the run directory, the log folder and the job id. Nothing is written when a check fails.

    \b
    Example:
      hpc-rl submit recipe.yaml
      hpc-rl submit gsm8k-grpo policy.steps=50 cluster.rollout.nodes=4 --follow
      hpc-rl submit recipe.yaml --dry-run
    """
    changed = list(overrides or [])
    if here:
        from hpc_rl.cli._start import allocation_placement

        changed.append(f"cluster.placement={allocation_placement()}")
    if dry_run:
        _dry_run(recipe, changed, site, as_json, here)
        return
    from hpc_rl.cli._checks import require_checks
    from hpc_rl.cli._prepare import create_run, discard, prepare
    from hpc_rl.cli._start import check_allocation, start

    prepared = prepare(recipe, changed, site=site, here=here)
    if here:
        check_allocation(prepared)
    require_checks(prepared, here=here)
    run, missing = create_run(prepared)
    try:
        started = start(run, prepared, here=here)
    except BaseException:
        discard(run)  # nothing was started: nothing is left
        raise
    tell(run, started, missing, as_json)
    if follow:
        from hpc_rl.cli._follow import follow as follow_run

        raise typer.Exit(follow_run(run))


def tell(run: RunDir, started: Started, missing: list[str], as_json: bool) -> None:
    """What was started, and where."""
    from hpc_rl.cli._console import note, print_json
    from hpc_rl.run.index import remember

    remember(run)
    for name in missing:
        note(f"warning: {name} is named in cluster.secrets but not set in this shell")
    if as_json:
        print_json(started.as_json())
        return
    print(f"run dir: {started.run_dir}")
    print(f"logs:    {started.logs}")
    print(f"job:     {started.job_id or f'none (local, process {started.pid})'}", flush=True)


def _dry_run(recipe: str, overrides: list[str], site: str | None, as_json: bool, here: bool) -> None:
    """Plan, resolved recipe and script on stdout, no job; then what is wrong with the files, on stderr."""
    if not as_json:
        print(f"# dry run of {recipe}: nothing is written or submitted", flush=True)
    from hpc_rl.cli._prepare import prepare

    _show(prepare(recipe, overrides, site=site, here=here), as_json)


def show_dry_run(prepared: Prepared, what: str, as_json: bool) -> None:
    """The dry run of something that was prepared already."""
    if not as_json:
        print(f"# dry run of the {what}: nothing is written or submitted", flush=True)
    _show(prepared, as_json)


def _show(prepared: Prepared, as_json: bool) -> None:
    from hpc_rl.cli._checks import errors, tell_errors, tell_warnings
    from hpc_rl.cli._preflight import files_preflight
    from hpc_rl.cli.errors import EXIT_USER_ERROR

    run_dir = _future_run(prepared)
    if not as_json:
        _print_dry_run(prepared, run_dir)
    findings = files_preflight(prepared.loaded, prepared.site, prepared.plan, prepared.recipe)
    if as_json:
        from dataclasses import asdict

        from hpc_rl.cli._console import print_json

        print_json(
            {
                "ok": not errors(findings),
                "findings": [asdict(finding) for finding in findings],
                "plan": prepared.plan.model_dump(mode="json"),
                "recipe": prepared.recipe.model_dump(mode="json"),
                "script": _script(prepared, run_dir),
            }
        )
    else:
        tell_warnings(findings)
    tell_errors(findings)
    if errors(findings):
        raise typer.Exit(EXIT_USER_ERROR)


def _print_dry_run(prepared: Prepared, run_dir: str) -> None:
    from hpc_rl.cli._summary import plan_summary

    print("\n".join(f"# {line}" for line in plan_summary(prepared.plan).splitlines()))
    print(f"\n# --- resolved.yaml\n{prepared.resolved_text}", flush=True)
    script = _script(prepared, run_dir)
    print(f"# --- job.sbatch\n{script}" if script else "# --- no script: the run starts on this machine")


def _script(prepared: Prepared, run_dir: str) -> str | None:
    if prepared.plan.placement == "local":
        return None
    from pathlib import Path

    from hpc_rl.cli._start import script_text

    return script_text(prepared, Path(run_dir))


def _future_run(prepared: Prepared) -> str:
    """Where the run directory would be."""
    return f"{prepared.recipe.output_root}/{prepared.recipe.name}/RUN_ID"
