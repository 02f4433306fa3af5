"""`report.html`: one self-contained page per run with inline SVG curves (no script, no network)."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_rl.telemetry.console import number
from hpc_rl.telemetry.metrics import Row, latest, read_metrics, series, surviving

# What a reader wants to see first; other metrics are listed in the table of last values.
CURVES = (
    ("eval/accuracy", "held-out accuracy"),
    ("rollout/reward_mean", "reward"),
    ("eval/loss", "validation loss"),
    ("train/loss", "loss"),
    ("train/accuracy", "pairs preferred as chosen"),
    ("train/margin", "margin of the pairs"),
    ("train/lr", "learning rate"),
    ("train/grad_norm", "gradient norm"),
    ("rollout/staleness_mean", "staleness (versions)"),
    ("train/mismatch_mean", "trainer-sampler mismatch"),
    ("rollout/tokens_per_s", "rollout tokens per second"),
    ("train/tokens_per_s", "trained tokens per second"),
    ("train/mfu", "model FLOPs utilisation"),
    ("time/step_s", "step time (s)"),
)

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:64rem;padding:0 1rem;
color:#1c2430;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.05rem;margin:0 0 .3rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1.2rem}
figure{margin:0;padding:.8rem;border:1px solid #d8dee6;border-radius:6px}
svg{width:100%;height:auto}table{border-collapse:collapse;margin:1rem 0}td,th{padding:.15rem .8rem;
text-align:left;
border-bottom:1px solid #e4e9ef}td.n{text-align:right;font-variant-numeric:tabular-nums}
@media(prefers-color-scheme:dark){
body{background:#14181d;color:#dfe6ee}figure{border-color:#333c47}td,th{border-color:#2b333d}}
"""


def svg_curve(points: Sequence[tuple[int, float]], *, width: int = 420, height: int = 160) -> str:
    """An SVG line with the extremes of both axes written out. `points` is not empty."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    left, right, top, bottom = 58, width - 8, 10, height - 22
    xspan, yspan = (x1 - x0) or 1, (y1 - y0) or 1.0

    def place(x: float, y: float) -> str:
        across = left + (x - x0) / xspan * (right - left)
        down = bottom - (y - y0) / yspan * (bottom - top)
        return f"{across:.1f},{down:.1f}"

    path = " ".join(place(x, y) for x, y in points)
    last = place(*points[-1]).split(",")
    text = 'font-size="11" fill="currentColor"'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img">'
        f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="currentColor" opacity=".35"/>'
        f'<polyline points="{path}" fill="none" stroke="#2f7bd6" stroke-width="2" stroke-linejoin="round"/>'
        f'<circle cx="{last[0]}" cy="{last[1]}" r="3" fill="#2f7bd6"/>'
        f'<text x="{left - 6}" y="{top + 6}" text-anchor="end" {text}>{_short(y1)}</text>'
        f'<text x="{left - 6}" y="{bottom}" text-anchor="end" {text}>{_short(y0)}</text>'
        f'<text x="{left}" y="{height - 6}" {text}>{x0}</text>'
        f'<text x="{right}" y="{height - 6}" text-anchor="end" {text}>step {x1}</text></svg>'
    )


def _short(value: float) -> str:
    return f"{value:.3g}"


def _table(pairs: Sequence[tuple[str, str]], *, numeric: bool) -> str:
    kind = ' class="n"' if numeric else ""
    rows = "".join(f"<tr><td>{html.escape(a)}</td><td{kind}>{html.escape(b)}</td></tr>" for a, b in pairs)
    return f"<table>{rows}</table>"


def render_report(
    name: str, rows: Sequence[Row], facts: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]
) -> str:
    """The page as text. `facts` is shown as it is; each attempt's keys become columns."""
    figures = []
    for metric, title in CURVES:
        points = series(rows, metric)
        if points:
            ends = f"{html.escape(metric)}: {_short(points[0][1])} to {_short(points[-1][1])}"
            head = f"<h2>{html.escape(title)}</h2><small>{ends}</small>"
            figures.append(f"<figure>{head}{svg_curve(points)}</figure>")
    parts = [f"<h1>{html.escape(name)}</h1>"]
    if facts:
        parts.append(_table([(key, str(value)) for key, value in facts.items()], numeric=False))
    parts.append(
        '<div class="grid">' + "".join(figures) + "</div>" if figures else "<p>No step was finished.</p>"
    )
    if attempts:
        columns = list(dict.fromkeys(key for attempt in attempts for key in attempt))
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(attempt.get(c, '')))}</td>" for c in columns) + "</tr>"
            for attempt in attempts
        )
        parts.append(f"<h2>Attempts</h2><table><tr>{head}</tr>{body}</table>")
    values = sorted((key, number(value, 4)) for key, value in latest(rows).items())
    if values:
        parts.append("<h2>Last values</h2>" + _table(values, numeric=True))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>{"".join(parts)}</html>\n'
    )


def write_report(
    metrics: Path,
    target: Path,
    *,
    name: str,
    facts: Mapping[str, Any] | None = None,
    attempts: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the report of `metrics` (a metrics.jsonl) to `target` atomically and return `target`."""
    rows = surviving(read_metrics(metrics))
    fresh = target.with_name(target.name + ".new")
    fresh.write_text(render_report(name, rows, facts or {}, attempts), encoding="utf-8")
    fresh.replace(target)
    return target
