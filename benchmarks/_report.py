"""What every benchmark prints: interleaved pairs, an A/A control, and one JSON line at the end.

A ratio is (ours / bound or peer), taken pair by pair from runs that alternate, so that a machine whose
speed drifts does not decide the result. The A/A control is the same statistic of one side against
itself: where it is far from 1, the machine was too noisy for the ratio to mean anything.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence


def interleave(
    ours: Callable[[], float], peer: Callable[[], float], runs: int, say: Callable[[str], None] = print
) -> tuple[list[float], list[float]]:
    """`runs` pairs A B, B A, A B, ...: the order alternates, so that neither always runs second."""
    left: list[float] = []
    right: list[float] = []
    for run in range(runs):
        first_ours = run % 2 == 0
        for mine in (first_ours, not first_ours):
            (left if mine else right).append((ours if mine else peer)())
        ratio = left[-1] / right[-1]
        say(f"pair {run + 1}/{runs}: ours {left[-1]:.4g}, peer {right[-1]:.4g}, ratio {ratio:.3f}")
    return left, right


def control(values: Sequence[float]) -> float:
    """A/A: the median ratio of neighbouring runs of one side."""
    pairs = [a / b for a, b in zip(values[::2], values[1::2], strict=False)]
    return statistics.median(pairs) if pairs else 1.0


def summary(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Seconds of two sides, pair by pair: the ratio and what it is made of."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    found = {
        "ratio": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "control": control(peer),
        "ours_s": statistics.median(ours),
        "peer_s": statistics.median(peer),
    }
    return {name: round(value, 4) for name, value in found.items()}


def report_seconds(
    name: str, ours: Sequence[float], peer: Sequence[float], *, goal: float, **facts: object
) -> dict[str, object]:
    """`report` of two sides that are measured in seconds."""
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    seconds = {f"{side}_s": round(statistics.median(of), 4) for side, of in (("ours", ours), ("peer", peer))}
    return report(name, ratios, goal=goal, better="lower", aa=control(peer), **seconds, **facts)


def report(
    name: str, ratios: Sequence[float], *, goal: float, better: str, aa: float, **facts: object
) -> dict[str, object]:
    """Print the last line: `name, ratio` (median), `goal`, `better`, `runs`, `min`, `max`, and more."""
    assert better in ("lower", "higher")
    line = {
        "name": name,
        "ratio": round(statistics.median(ratios), 4),
        "goal": goal,
        "better": better,
        "runs": len(ratios),
        "min": round(min(ratios), 4),
        "max": round(max(ratios), 4),
        "control": round(aa, 4),
        **facts,
    }
    print(json.dumps(line), flush=True)
    return line
