"""`hpc-rl upload`: checkpoints and exports of a run to S3 or the Hub, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hpc_rl.cli.errors import UserError

if TYPE_CHECKING:
    from hpc_rl.checkpoint.upload import Targets
    from hpc_rl.recipe.schema import Checkpoint
    from hpc_rl.run.paths import RunDir


def upload(
    run: str = typer.Argument(..., help="Run directory, recipe name (its latest run) or Slurm job id."),
    to: str | None = typer.Option(None, "--to", help="s3://bucket/prefix; default: the recipe's upload_s3."),
    hub: str | None = typer.Option(None, "--hub", help="Hub repository; default: the recipe's upload_hub."),
    what: str | None = typer.Option(None, "--what", help="final or all; default: the recipe's, else final."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be stored; no network."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Upload a run's newest checkpoint and final export, or finish an upload that was cut off.

    What is stored already is not sent again. Credentials come from this shell (AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL; HF_TOKEN), else from the run.

    \b
    Example:
      hpc-rl upload gsm8k-sft
      hpc-rl upload gsm8k-sft --to s3://my-bucket/runs --what all
      hpc-rl upload gsm8k-sft --hub my-model
    """
    from hpc_rl.checkpoint.upload_items import items_of
    from hpc_rl.cli._console import print_json
    from hpc_rl.run.index import find_run
    from hpc_rl.run.settings import load_run

    found = find_run(run)
    options = load_run(found).checkpoint
    targets = _targets(options, to, hub)
    chosen = what or (options.upload_s3.what if options.upload_s3 is not None else "final")
    if chosen not in ("final", "all"):
        raise UserError(f"--what {chosen!r}: must be final or all")
    items = items_of(found, "all" if chosen == "all" else "final")
    answer: dict[str, Any] = {"run_dir": str(found.root), "items": items}
    answer |= {"s3": str(targets.s3) if targets.s3 else None, "hub": targets.hub}
    if not items:
        raise UserError(f"{found.root} has no complete checkpoint and no export to upload")
    if targets.hub is not None and not (found.safetensors / "final").is_dir():
        raise UserError(
            f"{found.root} has no final export for the Hub; make one: "
            f"hpc-rl export {found.root} --out {found.safetensors / 'final'}"
        )
    done = True if dry_run else _upload(found, targets, items)
    if as_json:
        print_json(answer | {"done": done and not dry_run})
    elif done:
        _tell(found, targets, items, dry_run)
    if not done:
        raise typer.Exit(1)


def _targets(options: Checkpoint, to: str | None, hub: str | None) -> Targets:
    """The command line's; without it the recipe's."""
    from hpc_rl.checkpoint.s3 import Location, UploadError
    from hpc_rl.checkpoint.upload import Targets, targets_of

    if to is None and hub is None:
        targets = targets_of(options)
        if targets.s3 is None and targets.hub is None:
            raise UserError(
                "the recipe has no checkpoint.upload_s3 or upload_hub; say where to: --to s3://bucket/prefix "
                "or --hub NAME"
            )
        return targets
    try:
        location = Location.parse(to) if to is not None else None
    except UploadError as error:
        raise UserError(f"--to {error}") from error
    private = options.upload_hub.private if options.upload_hub is not None else True
    return Targets(location, hub, private)


def _upload(run: RunDir, targets: Targets, items: list[str]) -> bool:
    import logging
    import os
    import sys

    from hpc_rl.checkpoint.hub import TOKEN
    from hpc_rl.checkpoint.s3 import KEYS
    from hpc_rl.checkpoint.upload import Uploads, online
    from hpc_rl.run.attempts import read_attempts
    from hpc_rl.run.events import EventLog
    from hpc_rl.run.secrets import load_into_environ, read_secrets

    online()
    # This shell's values come first: those of the run may be why the upload failed.
    stored = [name for name in read_secrets(run) if not os.environ.get(name)]
    load_into_environ(run, stored)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    names = {*read_secrets(run), *KEYS, TOKEN} & set(os.environ)
    values = [os.environ[name] for name in names]
    events = EventLog(run, len(read_attempts(run)))
    return Uploads(run, events, values).run_all(targets, items)


def _tell(run: RunDir, targets: Targets, items: list[str], dry_run: bool) -> None:
    from hpc_rl.checkpoint.upload_items import run_location
    from hpc_rl.cli._console import size

    for item in items:
        nbytes = sum(path.stat().st_size for path in Path(run.root, item).rglob("*") if path.is_file())
        where = [f"{run_location(targets.s3, run)}/{item}"] if targets.s3 is not None else []
        where += [f"Hub {targets.hub}"] if targets.hub is not None and item.endswith("/final") else []
        for place in where:
            print(f"{'would upload' if dry_run else 'uploaded'} {item} ({size(nbytes)}) to {place}")
