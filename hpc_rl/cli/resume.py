"""`hpc-rl resume`: the next attempt of a run, from its run directory alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from hpc_rl.cli.errors import UserError

if TYPE_CHECKING:
    from hpc_rl.cli._prepare import Prepared
    from hpc_rl.cli._state import RunStatus
    from hpc_rl.run.paths import RunDir


def resume(
    run: str = typer.Argument(
        ..., help="Run directory, recipe name (its latest run), Slurm job id, or s3://bucket/prefix/run."
    ),
    overrides: list[str] = typer.Argument(
        None, metavar="[a.b=value]...", help="Keys that may change, see below."
    ),
    follow: bool = typer.Option(False, "--follow", help="Watch the run to its end; Ctrl-C detaches."),
    here: bool = typer.Option(False, "--here", help="Run inside this Slurm allocation (salloc)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Continue a run from its newest complete checkpoint, in the same run directory.

    Only its directory is needed: not the recipe file, not the plugins it came from, not the site profile.
    Where and how long it runs may change (cluster.*, policy.steps, rollout.replicas, checkpoint.*, eval.*,
    logging.*, …); what defines its numbers may not (seed, model, data, batch, algorithm). The whole table is
    in docs/cli.md, and printed when a key may not change. A run that was uploaded to S3 is downloaded first,
    into its output_root or the one that is given.

    \b
    Example:
      hpc-rl resume gsm8k-grpo
      hpc-rl resume runs/gsm8k-grpo/20260101-120000-ab12 cluster.time=24:00:00 policy.steps=1000
      hpc-rl resume s3://my-bucket/runs/gsm8k-grpo output_root=/scratch/me/runs cluster.site=other
    """
    from hpc_rl.cli._checks import require_checks
    from hpc_rl.cli._prepare import write_settings
    from hpc_rl.cli._start import allocation_placement, check_allocation, start
    from hpc_rl.cli._state import run_status
    from hpc_rl.cli.submit import tell
    from hpc_rl.run.index import find_run

    changed = list(overrides or [])
    found = downloaded(run, changed) if run.startswith("s3://") else find_run(run)
    status = run_status(found, live=False)
    refuse_live(found, status)
    if here:
        changed.append(f"cluster.placement={allocation_placement()}")
    prepared, differences = prepare_resume(found, changed, here=here)
    refuse_finished(found, status, prepared, differences)
    if here:
        check_allocation(prepared)
    use_stored_secrets(found, prepared.recipe.cluster.secrets)
    require_checks(prepared, here=here)
    missing = write_settings(found, prepared)
    _remember(found, status.attempt, differences)
    started = start(found, prepared, here=here)
    tell(found, started, missing, as_json)
    if follow:
        from hpc_rl.cli._follow import follow as follow_run

        raise typer.Exit(follow_run(found))


def downloaded(url: str, overrides: list[str]) -> RunDir:
    """The run of `url`, downloaded to its output_root, or to that of `overrides` (which is taken out)."""
    from pathlib import Path

    from hpc_rl.checkpoint.download import download_run
    from hpc_rl.checkpoint.s3 import Location
    from hpc_rl.cli._console import note
    from hpc_rl.run.index import remember

    roots = [word for word in overrides if word.startswith("output_root=")]
    for word in roots:
        overrides.remove(word)
    root = Path(roots[-1].partition("=")[2]) if roots else None
    run = download_run(Location.parse(url), root, note)
    remember(run)
    return run


def refuse_live(run: RunDir, status: RunStatus) -> None:
    """Two supervisors must not work on one run."""
    from hpc_rl.run.lock import live_holder

    holder = live_holder(run)
    if status.state in ("PENDING", "RUNNING", "REQUEUED") or holder is not None:
        who = f"job {status.job_id}" if status.job_id else str(holder or "its supervisor")
        state = status.state if holder is None else "RUNNING"
        raise UserError(
            f"{run.root} is {state} ({who}) and goes on by itself. To start it anew from its newest "
            f"checkpoint: `hpc-rl cancel {run.root}` first (--save: with a checkpoint of now), then resume"
        )


def prepare_resume(
    run: RunDir, overrides: list[str], *, here: bool = False
) -> tuple[Prepared, dict[str, tuple[Any, Any]]]:
    """The run's settings with `overrides`, and what they change. Raises UserError with the table."""
    from hpc_rl.cli._prepare import prepare
    from hpc_rl.cli._resume_keys import changes, refusals, table_text
    from hpc_rl.plan.make import read_plan
    from hpc_rl.plan.site import Site
    from hpc_rl.recipe.dump import read_resolved

    old = read_resolved(run.resolved)
    # The profile as it was at submission: a site file that has changed or gone must not matter.
    profile = None
    if not any(word.startswith("cluster.site=") for word in overrides):
        try:
            profile = Site.model_validate(read_plan(run.plan).site_profile)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{run.plan} is missing or damaged, so the site of the run is not known "
                f"({str(error).splitlines()[0]}); name it: cluster.site=NAME"
            ) from error
    prepared = prepare(run.resolved, overrides, profile=profile, here=here)
    before, after = old.model_dump(mode="json"), prepared.recipe.model_dump(mode="json")
    differences, refused = changes(before, after), refusals(before, after)
    if refused:
        lines = [
            f"{key} may not change on resume (is {differences[key][0]!r})" + (f": {why}" if why else "")
            for key, why in refused.items()
        ]
        lines.append("it would no longer be the same run; submit a new one instead. What may change:")
        raise UserError("\n".join([*lines, table_text()]))
    return prepared, differences


def refuse_finished(
    run: RunDir, status: RunStatus, prepared: Prepared, differences: dict[str, tuple[Any, Any]]
) -> None:
    """A completed run goes on only if it is given more steps, or epochs."""
    if status.state != "COMPLETED":
        return
    steps, epochs = prepared.recipe.policy.steps, prepared.recipe.policy.epochs
    before, now = differences.get("policy.epochs", (None, None))
    if now is not None and (before is None or now > before):
        return  # how many steps these are is known when the rows are counted
    total = steps or status.total_steps
    if total is not None and (status.step or 0) >= total:
        more = (
            f"policy.steps={2 * total}" if epochs is None else f"policy.epochs={2 * max(before or 0, epochs)}"
        )
        raise UserError(
            f"{run.root} has completed its {status.step} steps; give it more: hpc-rl resume {run.root} {more}"
        )


def use_stored_secrets(run: RunDir, names: list[str]) -> None:
    """Secrets that this shell does not set keep the values of the last submission."""
    import os

    from hpc_rl.run.secrets import load_into_environ

    load_into_environ(run, [name for name in names if not os.environ.get(name)])


def _remember(run: RunDir, attempt: int, differences: dict[str, tuple[Any, Any]]) -> None:
    from hpc_rl.run.events import EventLog

    EventLog(run, attempt).append("resume", changed={key: list(pair) for key, pair in differences.items()})
