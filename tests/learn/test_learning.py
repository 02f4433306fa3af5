"""Longer runs that must really learn (`make learn`); minutes each on two cores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from hpc_rl.telemetry.curve import curve
from tests.e2e.gsm8k import ROOT, run_gsm8k
from tests.e2e.harness import Run

pytestmark = [pytest.mark.learn, pytest.mark.timeout(3600)]


LOCAL = ("cluster.placement=local", "cluster.site=local")


@pytest.fixture(scope="module")
def sorting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The quickstart's data, and the weights of its first stage."""
    task = tmp_path_factory.mktemp("sorting")
    quickstart = ROOT / "recipes" / "quickstart"
    subprocess.run([sys.executable, str(quickstart / "make_model.py"), str(task)], check=True)
    run = Run.submit(
        quickstart / "sft.yaml", f"model.path={task / 'model'}",
        f"data.train.path={task / 'train_sft.jsonl'}", f"output_root={task / 'runs'}", *LOCAL,
    )  # fmt: skip
    run.complete(timeout_s=1800)
    return task, run.root / "safetensors" / "final"


def test_quickstart_learns_to_sort(tmp_path: Path) -> None:
    """Held-out greedy accuracy from below 0.4 to above 0.8; the script's exit code says so."""
    script = ROOT / "recipes" / "quickstart" / "run.py"
    done = subprocess.run(
        [sys.executable, str(script), "--folder", str(tmp_path)], capture_output=True, text=True, check=False
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("algorithm", ["gspo", "rloo"])
def test_other_algorithms_learn_to_sort(sorting: tuple[Path, Path], tmp_path: Path, algorithm: str) -> None:
    """The quickstart's second stage by GSPO and RLOO: from below 0.4 to above 0.8, as GRPO."""
    task, weights = sorting
    recipe = ROOT / "recipes" / "quickstart" / f"{algorithm}.yaml"
    run = Run.submit(
        recipe, f"model.path={weights}", f"data.train.path={task / 'train.jsonl'}",
        f"data.eval.path={task / 'eval.jsonl'}", f"output_root={tmp_path}", *LOCAL,
    )  # fmt: skip
    run.complete(timeout_s=1800)
    accuracy = [(row["step"], row["eval/accuracy"]) for row in run.metrics() if "eval/accuracy" in row]
    print(curve(accuracy, title=f"held-out greedy accuracy by {algorithm} step"))
    assert accuracy[0][1] < 0.4
    assert accuracy[-1][1] > 0.8


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
