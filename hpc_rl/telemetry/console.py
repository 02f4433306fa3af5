"""One row of metrics as a line for people: the step line of logs and `--follow`, and Slurm's comment."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

# (metric, label, digits after the point; None: three significant ones); those that exist are shown, in
# this order.
_COLUMNS = (
    ("train/loss", "loss", 4),
    ("eval/loss", "eval", 4),
    ("train/accuracy", "pairs", 3),
    ("rollout/reward_mean", "reward", 3),
    ("eval/accuracy", "accuracy", 3),
    ("train/lr", "lr", None),
    ("train/grad_norm", "grad", 3),
    ("rollout/staleness_mean", "staleness", 2),
    ("rollout/tokens_per_s", "tok/s", 0),
    ("train/mfu", "mfu", 3),
    ("time/step_s", "s", 2),
)
ETA_STEPS = 50  # of the newest steps, whose pace is the estimate


def number(value: Any, digits: int | None) -> str:
    """`value` with at most `digits` decimals; tiny ones in scientific form, text as it is."""
    if not isinstance(value, int | float):
        return str(value)
    if digits is None:
        return f"{value:.3g}"
    if value != 0 and digits and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.0f}" if digits == 0 else f"{value:.{digits}f}"


def step_name(step: int, total: int | None) -> str:
    """`95/500`, or `95` where the total is not known."""
    return f"{step}/{total}" if total else str(step)


def tokens_per_second(row: Mapping[str, Any]) -> float | None:
    """The rollout's rate if the row has it, or the trainer's, or trained tokens over the step's time."""
    for name in ("rollout/tokens_per_s", "train/tokens_per_s"):
        rate = row.get(name)
        if isinstance(rate, int | float):
            return float(rate)
    tokens, seconds = row.get("train/tokens"), row.get("time/step_s")
    if isinstance(tokens, int | float) and isinstance(seconds, int | float) and seconds > 0:
        return float(tokens) / float(seconds)
    return None


def duration(seconds: float) -> str:
    """`45s`, `12m`, `3h05m`, `2d04h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f}s"
    if minutes < 90:
        return f"{minutes}m"
    hours = round(minutes / 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def eta_seconds(moments: Iterable[tuple[int, float]], total: int | None) -> float | None:
    """Seconds until step `total` at the pace of `moments` ((step, seconds since any epoch), ascending).

    It is the wall clock's pace: saves and evaluations are in it. None for fewer than two moments, or at
    the end.
    """
    known = list(moments)
    if total is None or len(known) < 2 or known[-1][0] >= total or known[-1][0] <= known[0][0]:
        return None
    pace = (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])
    return max(0.0, pace * (total - known[-1][0]))


def eta_of_rows(rows: Iterable[Mapping[str, Any]], total: int | None) -> float | None:
    """The same from rows of metrics.jsonl; only those of the newest attempt (between two, nothing ran)."""
    found = list(rows)
    newest = [row for row in found if row.get("attempt") == found[-1].get("attempt")]
    moments = [(row["step"], row["time"]) for row in newest if isinstance(row.get("time"), int | float)]
    return eta_seconds(moments[-ETA_STEPS:], total)


class Pace:
    """The moments of the newest steps of this process."""

    def __init__(self) -> None:
        self._moments: deque[tuple[int, float]] = deque(maxlen=ETA_STEPS)

    def step(self, step: int, total: int | None) -> float | None:
        """Step `step` was done just now; the seconds until step `total`."""
        self._moments.append((step, time.monotonic()))
        return eta_seconds(self._moments, total)


def step_line(row: Mapping[str, Any], total: int | None = None, eta_s: float | None = None) -> str:
    """`step 95/500 loss 0.1234 reward 0.540 … eta 12m` with the metrics that the row has."""
    values = dict(row)
    rate = tokens_per_second(row)
    if rate is not None:
        values["rollout/tokens_per_s"] = rate
    parts = [f"step {step_name(row['step'], total)}"]
    parts += [f"{label} {number(values[name], digits)}" for name, label, digits in _COLUMNS if name in values]
    if eta_s is not None:
        parts.append(f"eta {duration(eta_s)}")
    return " ".join(parts)


def job_comment(row: Mapping[str, Any], total: int | None = None) -> str:
    """`95/500 reward .54 1234tok/s`: short, no quotes or blanks trouble; for `squeue -o %k`."""
    parts = [step_name(row["step"], total)]
    reward = row.get("rollout/reward_mean")
    if isinstance(reward, int | float):
        parts.append(f"reward={reward:.3f}")
    elif isinstance(row.get("train/loss"), int | float):
        parts.append(f"loss={row['train/loss']:.4f}")
    rate = tokens_per_second(row)
    if rate is not None:
        parts.append(f"{rate:.0f}tok/s")
    return " ".join(parts)
