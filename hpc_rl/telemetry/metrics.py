"""`metrics.jsonl`: one JSON object per step, in the surviving lineage each step once.

Every object has `step` (int, 0 is "before the first step"), `time` (seconds since the epoch),
`attempt` (int) and slash-named numbers (`train/loss`, `rollout/reward_mean`, `eval/accuracy`).
The controller is the only writer (`MetricsLog`); everyone else reads. A crash may leave a torn last
line: readers skip it and the next writer ends it, so a line is either whole or ignored.

After a checkpoint of step s is restored, rows with step > s are moved to `metrics_rolled_back.jsonl`
(`MetricsLog.roll_back`): they happened, but to weights that no longer exist.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpc_rl.run.jsonl import Appender

Row = dict[str, Any]
RESERVED = ("step", "time", "attempt")


class MetricsError(ValueError):
    """A row that must not get into `metrics.jsonl`; the message names the key."""


def make_row(step: int, attempt: int, values: Mapping[str, float], *, when: float | None = None) -> Row:
    """A checked row. Non-finite numbers become strings (`nan`, `inf`): JSON has no literal for them.

    Raises MetricsError for a name without a slash or a value that is not a number.
    """
    row: Row = {
        "step": int(step),
        "time": round(time.time() if when is None else when, 3),
        "attempt": int(attempt),
    }
    for name, value in values.items():
        if "/" not in name:
            raise MetricsError(f"metric name {name!r}: use a slash name such as train/{name}")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise MetricsError(f"metric {name}: {value!r} is not a number") from error
        if not math.isfinite(number):
            row[name] = str(number)
        else:
            row[name] = value if isinstance(value, int) else number
    return row


class MetricsLog:
    """The writer of one run's `metrics.jsonl`; appends whole lines, flushed at once."""

    def __init__(self, path: Path | str, attempt: int) -> None:
        self.path = Path(path)
        self.attempt = attempt
        self._file = Appender(self.path, sync=False, mode=0o666)

    def append(self, step: int, values: Mapping[str, float]) -> Row:
        """Write the row of `step` and return it. Raises MetricsError for a bad name or value."""
        row = make_row(step, self.attempt, values)
        self._file.append(row)
        return row

    def roll_back(self, step: int) -> int:
        """Move rows of steps after `step` aside; returns how many. Call once, after a restore."""
        rows = read_metrics(self.path)
        gone = [row for row in rows if row["step"] > step]
        if not gone:
            return 0
        aside = self.path.with_name("metrics_rolled_back.jsonl")
        with aside.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in gone)
            file.flush()
            os.fsync(file.fileno())
        # Aside first, then the atomic swap: a crash between the two repeats rows aside, loses none.
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        return len(gone)


def parse_lines(lines: Iterable[str]) -> list[Row]:
    """Rows of JSON lines; torn or foreign lines are skipped."""
    rows: list[Row] = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_metrics(path: Path | str) -> list[Row]:
    """The rows of the file in order; an absent file has none."""
    path = Path(path)
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return parse_lines(file)


def surviving(rows: Iterable[Row]) -> list[Row]:
    """Each step once, in step order: a later attempt that redoes step s undoes all rows from s on.

    Rows of the same attempt and step are merged (an evaluation may come after its step).
    """
    lineage: list[Row] = []
    for row in rows:
        attempt = row.get("attempt", 0)
        while lineage and lineage[-1]["step"] >= row["step"] and lineage[-1].get("attempt", 0) < attempt:
            lineage.pop()
        if lineage and lineage[-1]["step"] == row["step"]:
            lineage[-1] = {**lineage[-1], **row}
        else:
            lineage.append(row)
    return lineage


def latest(rows: Iterable[Row]) -> dict[str, float | str]:
    """The newest value of every metric over all rows (an evaluation is not in every row)."""
    values: dict[str, float | str] = {}
    for row in rows:
        values.update({name: value for name, value in row.items() if name not in RESERVED})
    return values


def series(rows: Iterable[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, finite values only."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [(step, float(value)) for step, value in points if math.isfinite(value)]


def last_step(path: Path | str) -> int | None:
    """The last step of the surviving lineage from the end of the file (cheap; for `status`)."""
    rows = tail_rows(path, 1)
    return rows[-1]["step"] if rows else None


def tail_rows(path: Path | str, count: int, *, block: int = 65536) -> list[Row]:
    """The last `count` rows without reading a long file whole."""
    path = Path(path)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        data = b""
        while end > 0 and data.count(b"\n") <= count + 1:
            start = max(0, end - block)
            file.seek(start)
            data = file.read(end - start) + data
            end = start
    lines = data.decode("utf-8", errors="replace").splitlines()
    return parse_lines(lines if end == 0 else lines[1:])[-count:]
