"""`hpc-rl verify`: whether the files of checkpoints and of the final export are as they were written."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_rl.checkpoint.checking import Checked
    from hpc_rl.run.paths import RunDir

SHOW_EVERY_S = (0.2, 10.0)  # on a terminal, in a log file


def verify(
    run: str = typer.Argument(..., help="Run directory, recipe name (its latest run) or Slurm job id."),
    step: int | None = typer.Option(
        None, "--step", min=0, help="One checkpoint; default: all complete ones and the final export."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Read checkpoints and the final export, and compare them with what was written.

    Every byte of a checkpoint is read and compared with the checksums in its COMPLETE. The final export
    has no checksums: its files are compared with their headers and the index. Nothing is changed, and the
    run may go on meanwhile. Exit code 0: all is whole; 1: something is damaged, and its files are named.

    \b
    Example:
      hpc-rl verify gsm8k-grpo
      hpc-rl verify 123456 --step 300 --json
    """
    from hpc_rl.cli._console import print_json
    from hpc_rl.run.index import find_run

    found = find_run(run)
    checkpoints, export = _wanted(found, step)
    checked = _check(found, checkpoints, export, quiet=as_json)
    damaged = [item for item in checked if item.problems]
    if as_json:
        items = [item.as_json() for item in checked]
        print_json({"run_dir": str(found.root), "ok": not damaged, "items": items})
    if damaged:
        raise typer.Exit(1)


def _wanted(run: RunDir, step: int | None) -> tuple[list[Path], Path | None]:
    """Checkpoints and export to look at. Raises UserError where there is nothing of the kind."""
    from hpc_rl.checkpoint.checking import saved_checkpoints
    from hpc_rl.cli.errors import UserError

    saved, final = saved_checkpoints(run), run.safetensors / "final"
    if step is not None:
        if run.checkpoint(step) not in saved:
            known = ", ".join(str(int(path.name.removeprefix("step_"))) for path in saved) or "none"
            raise UserError(f"no complete checkpoint of step {step} in {run.root}; complete ones: {known}")
        return [run.checkpoint(step)], None
    if not saved and not final.is_dir():
        raise UserError(f"{run.root} has neither a complete checkpoint nor a final export to verify")
    return saved, final if final.is_dir() else None


def _check(run: RunDir, checkpoints: list[Path], export: Path | None, *, quiet: bool) -> list[Checked]:
    """Look at each in turn: its line when it is done, progress between."""
    from hpc_rl.checkpoint.checking import check_checkpoint, check_export, planned_bytes

    progress = Progress(sum(planned_bytes(folder) for folder in checkpoints))
    found = []
    for folder in [*checkpoints, *([export] if export is not None else [])]:
        progress.name = str(folder.relative_to(run.root))
        item = check_export(folder) if folder == export else check_checkpoint(folder, progress.read)
        progress.end()
        found.append(item)
        if not quiet:
            typer.echo(line(item, progress.name))
    return found


def line(item: Checked, name: str) -> str:
    """`ok       checkpoints/step_00000100  2.5 MiB in 5 files`, or what is damaged."""
    from hpc_rl.cli._console import size

    if item.gone:
        return f"gone     {name}  removed by the run meanwhile (checkpoint.max_keep)"
    notes = f" ({'; '.join(item.notes)})" if item.notes else ""
    if item.problems:
        return f"DAMAGED  {name}  {'; '.join(item.problems)}{notes}"
    return f"ok       {name}  {size(item.nbytes)} in {item.files} files{notes}"


class Progress:
    """`checkpoints/step_00000100: 1.2 of 14.2 GiB, 8 %` on stderr, told by the threads that read."""

    def __init__(self, nbytes: int) -> None:
        from hpc_rl.cli._console import LiveLine

        self.name, self._nbytes, self._read = "", nbytes, 0
        self._line, self._lock = LiveLine(), threading.Lock()
        self._every = SHOW_EVERY_S[0 if sys.stderr.isatty() else 1]
        self._shown = time.monotonic()

    def read(self, nbytes: int) -> None:
        from hpc_rl.cli._console import size

        with self._lock:
            self._read += nbytes
            if time.monotonic() - self._shown < self._every:
                return
            self._shown = time.monotonic()
            share = 100 * self._read // max(1, self._nbytes)
            self._line.show(f"{self.name}: read {size(self._read)} of {size(self._nbytes)}, {share} %")

    def end(self) -> None:
        self._line.end()
