"""A curve in the terminal: one metric over steps as plain text, for logs, `--follow` and the quickstart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Points = Sequence[tuple[float, float]]
_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], *, low: float | None = None, high: float | None = None) -> str:
    """One character per value: `▁▂▅█`."""
    if not values:
        return ""
    bottom = min(values) if low is None else low
    top = max(values) if high is None else high
    span = (top - bottom) or 1.0
    levels = [min(7, max(0, int((value - bottom) / span * 7.999))) for value in values]
    return "".join(_BLOCKS[level] for level in levels)


def curve(
    points: Points,
    *,
    title: str = "",
    width: int = 60,
    height: int = 8,
    low: float | None = None,
    high: float | None = None,
    ascii_only: bool = False,
) -> str:
    """Draw `(step, value)` points as lines of text, the first and last value named beside the title.

    `low` and `high` fix the value axis (accuracy: 0 and 1). Non-finite values are left out. Returns
    a note instead of a plot when there is no point.
    """
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not finite:
        return f"{title}: no values yet" if title else "no values yet"
    bottom = min(y for _, y in finite) if low is None else low
    top = max(y for _, y in finite) if high is None else high
    if top <= bottom:
        top = bottom + 1.0
    rows = _raster(finite, width, height, bottom, top, "*" if ascii_only else "•")
    left, mid = ("|", "-") if ascii_only else ("│", "─")
    lines = [f"{title}  {finite[0][1]:.3f} -> {finite[-1][1]:.3f}".strip()]
    for index, row in enumerate(rows):
        value = top - (top - bottom) * index / max(1, height - 1)
        label = f"{value:8.3f}" if index in (0, height - 1) else ""
        lines.append(f"{label:8} {left}{row}".rstrip())
    lines.append(" " * 9 + ("+" if ascii_only else "└") + mid * width)
    first, last = f"{finite[0][0]:g}", f"{finite[-1][0]:g}"
    lines.append(" " * 10 + first + last.rjust(width - len(first)) if len(finite) > 1 else " " * 10 + first)
    return "\n".join(lines)


def _raster(points: Points, width: int, height: int, bottom: float, top: float, mark: str) -> list[str]:
    """Rows of characters, top first; straight lines between neighbours, one mark per column."""
    grid = [[" "] * width for _ in range(height)]
    x0, x1 = points[0][0], points[-1][0]
    span = (x1 - x0) or 1.0
    for column in range(width if len(points) > 1 else 1):
        x = x0 + span * column / max(1, width - 1)
        share = (_value_at(points, x) - bottom) / (top - bottom)
        level = round(min(1.0, max(0.0, share)) * (height - 1))
        grid[height - 1 - level][column] = mark
    return ["".join(row) for row in grid]


def _value_at(points: Points, x: float) -> float:
    for (xa, ya), (xb, yb) in itertools.pairwise(points):
        if xa <= x <= xb:
            return ya if xb == xa else ya + (yb - ya) * (x - xa) / (xb - xa)
    return points[-1][1]
