"""The report of a run directory: what `report.html` says beside the curves."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hpc_rl.run.attempts import Attempt, read_attempts
from hpc_rl.run.best import read_best
from hpc_rl.run.paths import RunDir
from hpc_rl.run.settings import load_run
from hpc_rl.telemetry.report import write_report


def write_run_report(run: RunDir) -> Path:
    """Write `report.html` from metrics, attempts and recipe as they are on disk now.

    The supervisor does when an attempt is closed: only then its end is known. Raises RunError or OSError.
    """
    recipe = load_run(run)
    algorithm = recipe.algorithm.get("name") if recipe.algorithm else None
    facts = {
        "kind": f"{recipe.kind} ({algorithm})" if algorithm else recipe.kind,
        "model": recipe.model.path,
        "data": recipe.data.train.path,
        "seed": recipe.seed,
        "run directory": run.root,
        "written": _moment(time.time()),
    }
    best = read_best(run)
    if best is not None:
        facts["best checkpoint"] = f"{best}: {run.checkpoint(best.step)}"
    attempts = [_row(attempt) for attempt in read_attempts(run)]
    name = f"{run.recorded_name()}/{run.run_id}"
    return write_report(run.metrics, run.report, name=name, facts=facts, attempts=attempts)


def _row(attempt: Attempt) -> dict[str, Any]:
    seconds = None if attempt.end is None else attempt.end - attempt.start
    return {
        "attempt": attempt.attempt,
        "job": attempt.job_id or "",
        "nodes": " ".join(attempt.nodes) or attempt.host,
        "start": _moment(attempt.start),
        "lasted": "" if seconds is None else f"{seconds:.0f} s",
        "end": attempt.reason or "not ended yet",
        "exit code": "" if attempt.exit_code is None else attempt.exit_code,
        "first cause": attempt.first_cause or "",
    }


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))
