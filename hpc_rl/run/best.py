"""`checkpoints/best.json`: which complete checkpoint has the best validation, and by what number.

    {"step": 40, "metric": "eval/loss", "value": 1.234}

The controller writes it after that checkpoint is complete; retention, `clean`, `status` and the report
read it.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_rl.run.paths import COMPLETE, RunDir

LOWER_IS_BETTER = ("eval/loss", "eval/perplexity", "eval/length_mean", "eval/truncated", "eval/failed")


@dataclass(frozen=True)
class Best:
    """The checkpoint of `step` has the best `value` of `metric`."""

    step: int
    metric: str
    value: float

    def __str__(self) -> str:
        return f"step {self.step} ({self.metric} {self.value:.4g})"


def improves(metric: str, value: float, on: Best | None, mode: str | None = None) -> bool:
    """Whether `value` is better than that of `on` (equal is not; a value that is not finite never is).

    `mode` is `max` or `min`; None: as the metric usually is.
    """
    if not math.isfinite(value):
        return False
    if on is None or on.metric != metric:
        return True
    lower = metric in LOWER_IS_BETTER if mode is None else mode == "min"
    return value < on.value if lower else value > on.value


def best_file(run: RunDir) -> Path:
    return run.checkpoints / "best.json"


def read_best(run: RunDir) -> Best | None:
    """The recorded best checkpoint; None without a record or if that checkpoint is no longer complete."""
    try:
        found = Best(**json.loads(best_file(run).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # absent, or not written by us: then no checkpoint is marked
        return None
    return found if (run.checkpoint(found.step) / COMPLETE).is_file() else None


def write_best(run: RunDir, best: Best | None) -> None:
    """Record `best` atomically and durably (None: there is none)."""
    path = best_file(run)
    if best is None:
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(f".best.json.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(best)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
