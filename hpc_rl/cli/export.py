"""`hpc-rl export`: a checkpoint of a run as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hpc_rl.run.paths import RunDir


def export(
    run: str = typer.Argument(..., help="Run directory, recipe name (its latest run) or Slurm job id."),
    step: int | None = typer.Option(
        None, "--step", min=0, help="A complete checkpoint; default: the newest."
    ),
    out: Path | None = typer.Option(None, "--out", help="Folder; default: <run>/safetensors/step_XXXXXXXX."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Write a checkpoint as safetensors that load with from_pretrained and in vLLM as they are.

    Runs on this machine's CPU (the [train] extra); the run may go on meanwhile.

    \b
    Example:
      hpc-rl export gsm8k-grpo
      hpc-rl export 123456 --step 300 --out ~/models/gsm8k-300
    """
    from hpc_rl.cli._console import note, print_json
    from hpc_rl.cli.errors import UserError
    from hpc_rl.run.index import find_run

    found = find_run(run)
    complete = found.complete_steps()
    if not complete:
        raise UserError(f"{found.root} has no complete checkpoint to export")
    chosen = complete[-1] if step is None else step
    if chosen not in complete:
        known = ", ".join(str(number) for number in complete)
        raise UserError(f"no complete checkpoint of step {chosen}; complete ones: {known}")
    target = (out or found.safetensors / found.checkpoint(chosen).name).expanduser().absolute()
    if target.exists():
        raise UserError(f"{target} exists already; choose another --out, or remove it")
    note(f"exporting step {chosen} of {found.root}")
    _convert(found, chosen, target)
    if as_json:
        print_json({"run_dir": str(found.root), "step": chosen, "path": str(target)})
    else:
        print(target)


def _convert(run: RunDir, step: int, target: Path) -> None:
    from hpc_rl.checkpoint.offline import export_checkpoint  # torch and transformers: seconds
    from hpc_rl.run.settings import load_run

    load_run(run, plugins=True)  # a plugin may bring the model
    export_checkpoint(run, step, target)
