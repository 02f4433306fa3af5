"""Longer runs that must really learn (`make learn`); minutes each on two cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from hpc_rl.telemetry.curve import curve
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
    """From below 0.3 to above 0.8 on the training prompts; the right number beside it, without a claim.

    A step has eight prompts, so one row alone is noise: means over the first and the last five steps.
    """
    run = run_gsm8k(devcluster, tmp_path)
    rows = [row for row in run.metrics() if "reward/format" in row]
    evaluations = [row for row in run.metrics() if "eval/format" in row]
    for name in ("reward/format", "reward/gsm8k"):
        print(curve([(row["step"], row[name]) for row in rows], title=f"{name} by step"))
    for row in evaluations:
        print(f"step {row['step']}: eval/format {row['eval/format']:.3f}, eval/gsm8k {row['eval/gsm8k']:.3f}")
    first, last = (fmean(row["reward/format"] for row in part) for part in (rows[:5], rows[-5:]))
    print(f"format reward {first:.3f} -> {last:.3f}")
    assert first < 0.3
    assert last > 0.8
