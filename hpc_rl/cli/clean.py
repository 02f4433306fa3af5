"""`hpc-rl clean`: remove what a run no longer needs. Shows it first; `--yes` does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hpc_rl.checkpoint.cleaning import Item
    from hpc_rl.run.paths import RunDir


def clean(
    run: str = typer.Argument(..., help="Run directory, recipe name (its latest run) or Slurm job id."),
    yes: bool = typer.Option(False, "--yes", help="Remove it; without this it is only shown."),
    keep: int = typer.Option(1, "--keep", min=1, help="Complete checkpoints to keep, the newest."),
    logs: bool = typer.Option(False, "--logs", help="Also the logs of all attempts but the latest."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show, or with --yes remove, what a run no longer needs.

    Kept: the newest complete checkpoint, the best one, the final export (or the newest, if there is none),
    and everything that hpc-rl did not write. Removed: older checkpoints, exports of steps, what crashes left.
    A run that is running removes superseded checkpoints by itself (checkpoint.max_keep) and is refused.

    \b
    Example:
      hpc-rl clean gsm8k-sft
      hpc-rl clean gsm8k-sft --keep 2 --logs --yes
    """
    from hpc_rl.checkpoint.cleaning import removable, remove
    from hpc_rl.cli._console import note, print_json, size, table
    from hpc_rl.run.index import find_run

    found = find_run(run)
    waiting = _waiting(found)
    items = removable(found, keep=keep, logs=logs, waiting=waiting)
    if waiting:
        note("the run's job has not started yet: only superseded checkpoints are looked at")
    gone = remove(items) if yes else items
    nbytes, files = sum(item.nbytes for item in gone), sum(item.files for item in gone)
    if as_json:
        print_json({
            "run_dir": str(found.root), "removed": yes, "bytes": nbytes, "files": files,
            "items": [item.as_json() for item in gone],
        })  # fmt: skip
        return
    if not gone:
        note(f"nothing to remove in {found.root}")
        return
    rows = [[size(item.nbytes), item.files, item.why, _shown(item, found)] for item in gone]
    typer.echo(table(["size", "files", "what", "folder"], rows))
    total = f"{size(nbytes)} in {files} files"
    note(f"removed {total}" if yes else f"would remove {total}; do it with --yes")


def _shown(item: Item, run: RunDir) -> str:
    return str(item.path.relative_to(run.root))


def _waiting(run: RunDir) -> bool:
    """Whether the run's job is queued. Raises UserError if somebody works on the run."""
    from hpc_rl.cli._state import run_status
    from hpc_rl.cli.errors import UserError
    from hpc_rl.run.lock import live_holder

    state, holder = run_status(run, live=False).state, live_holder(run)
    if state == "RUNNING" or holder is not None:
        raise UserError(
            f"{run.root} is running ({holder or 'its supervisor'}): it removes superseded checkpoints by "
            "itself (checkpoint.max_keep). Clean it when it has ended, or `hpc-rl cancel --save` it first"
        )
    return state in ("PENDING", "REQUEUED")
