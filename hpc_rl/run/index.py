"""Finding a run by its directory, its name (the latest) or its Slurm job id.

A small index of the user's runs lies in the state folder of the XDG convention; runs that it does
not know are looked for under the output roots that the caller names. The index is a convenience:
it may be deleted, and runs that are gone are passed over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from hpc_rl.run import jsonl
from hpc_rl.run.paths import RunDir, RunError


def index_path() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "hpc-rl" / "runs.jsonl"


def remember(run: RunDir) -> None:
    """Add `run` to the index. A home that cannot be written only loses the convenience."""
    path = index_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        jsonl.append(path, {"run_dir": str(run.root), "name": run.name, "time": time.time()}, sync=False)
    except OSError:
        return


def known_runs(roots: Iterable[Path | str] = ()) -> list[RunDir]:
    """Runs of the index and of `roots` that still exist, oldest first."""
    try:
        entries = jsonl.read(index_path())
    except RunError:
        entries = []
    found = {Path(str(entry["run_dir"])) for entry in entries}
    for root in roots:
        found.update(path.parent.absolute() for path in Path(root).expanduser().glob("*/*/resolved.yaml"))
    alive = [path for path in found if (path / "resolved.yaml").exists()]
    return [RunDir(path) for path in sorted(alive, key=lambda path: (path.stat().st_ctime, path.name))]


def job_ids(run: RunDir) -> list[str]:
    """Every Slurm job id of the run, as submitted and as its attempts saw it, oldest first."""
    entries = [*jsonl.read(run.jobs), *jsonl.read(run.attempts)]
    return list(dict.fromkeys(str(entry["job_id"]) for entry in entries if entry.get("job_id")))


def _has_job(run: RunDir, job_id: str) -> bool:
    try:
        return job_id in job_ids(run)
    except RunError:  # a damaged run is not the one that is looked for; its own status says what is wrong
        return False


def _no_run(path: Path) -> str:
    """Why a path that exists is no run, with the run that was probably meant."""
    if not path.is_dir():
        return f"{path} is a file, no run directory"
    for parent in path.absolute().parents:
        if (parent / "resolved.yaml").exists():
            return f"{path} lies inside the run {parent}"
    below = known = sorted(path.glob("*/resolved.yaml")) or sorted(path.glob("*/*/resolved.yaml"))
    if below:
        newest = max(known, key=lambda found: found.stat().st_ctime).parent
        return f"{path} is no run directory, but holds {len(below)}; the newest: {newest}"
    return f"{path} is a folder, but no run directory (it has no resolved.yaml)"


def find_run(token: str | Path, roots: Iterable[Path | str] = ("runs",)) -> RunDir:
    """The run named by a directory, a job id, a run id or a recipe name: its latest run under `roots`, else
    anywhere. Another folder's run of the same name is seldom meant, and `resume` or `clean` would change it.

    Raises RunError that lists what there is.
    """
    path = Path(token).expanduser()
    if path.is_dir() and (path / "resolved.yaml").exists():
        return RunDir(path)
    runs = known_runs(roots)
    text = str(token)
    here = {Path(root).expanduser().absolute() for root in roots}
    near = [run for run in runs if run.root.parent.parent in here]
    for run in [*reversed(near), *reversed([run for run in runs if run not in near])]:
        if text in (run.name, run.run_id) or _has_job(run, text.partition("+")[0]):
            return run
    names = ", ".join(sorted({run.name for run in runs})) or "none"
    if path.exists():
        raise RunError(f"{_no_run(path)}; a name or a job id does as well: known names: {names}")
    raise RunError(f"no run is named {text!r} (a run directory, a name or a job id); known names: {names}")
