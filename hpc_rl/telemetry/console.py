"""One row of metrics as a line for people: the step line of logs and `--follow`, and Slurm's comment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# (metric, label, digits after the point); the first that exist are shown, in this order.
_COLUMNS = (
    ("train/loss", "loss", 4),
    ("rollout/reward_mean", "reward", 3),
    ("eval/accuracy", "accuracy", 3),
    ("train/grad_norm", "grad", 3),
    ("rollout/staleness_mean", "staleness", 2),
    ("rollout/tokens_per_s", "tok/s", 0),
    ("time/step_s", "s", 2),
)


def number(value: Any, digits: int) -> str:
    """`value` with at most `digits` decimals; tiny ones in scientific form, text as it is."""
    if not isinstance(value, int | float):
        return str(value)
    if value != 0 and digits and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:,.0f}" if digits == 0 else f"{value:.{digits}f}"


def step_name(step: int, total: int | None) -> str:
    """`95/500`, or `95` where the total is not known."""
    return f"{step}/{total}" if total else str(step)


def tokens_per_second(row: Mapping[str, Any]) -> float | None:
    """The rollout's rate if the row has it, else trained tokens over the step's time."""
    rate = row.get("rollout/tokens_per_s")
    if isinstance(rate, int | float):
        return float(rate)
    tokens, seconds = row.get("train/tokens"), row.get("time/step_s")
    if isinstance(tokens, int | float) and isinstance(seconds, int | float) and seconds > 0:
        return float(tokens) / float(seconds)
    return None


def step_line(row: Mapping[str, Any], total: int | None = None) -> str:
    """`step 95/500 loss 0.1234 reward 0.540 …` with the metrics that the row has."""
    values = dict(row)
    rate = tokens_per_second(row)
    if rate is not None:
        values["rollout/tokens_per_s"] = rate
    parts = [f"step {step_name(row['step'], total)}"]
    parts += [f"{label} {number(values[name], digits)}" for name, label, digits in _COLUMNS if name in values]
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
