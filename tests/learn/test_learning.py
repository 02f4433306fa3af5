"""Longer runs that must really learn (`make learn`); minutes each on two cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.gsm8k import ROOT, run_gsm8k

pytestmark = [pytest.mark.learn, pytest.mark.timeout(3600)]


def test_quickstart_learns_to_sort(tmp_path: Path) -> None:
    """Held-out greedy accuracy from below 0.4 to above 0.8; the script's exit code says so."""
    script = ROOT / "recipes" / "quickstart" / "run.py"
    done = subprocess.run(
        [sys.executable, str(script), "--folder", str(tmp_path)], capture_output=True, text=True, check=False
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_gsm8k_format_reward_rises(devcluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """From below 0.3 to above 0.8 on the training prompts; the right number beside it, without a claim."""
    run = run_gsm8k(devcluster, tmp_path)
    rows = [row for row in run.metrics() if "reward/format" in row]
    first, last = rows[0]["reward/format"], rows[-1]["reward/format"]
    print(
        {row["step"]: (row["reward/format"], row["reward/gsm8k"]) for row in rows[:: max(1, len(rows) // 12)]}
    )
    print(
        "evaluation",
        [(r["step"], r["eval/format"], r["eval/gsm8k"]) for r in run.metrics() if "eval/format" in r],
    )
    assert first < 0.3
    assert last > 0.8
