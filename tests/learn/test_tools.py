"""A tiny model learns to call the calculator (`make learn`): SFT on few calls, then GRPO with the tool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.telemetry.curve import curve
from tests.e2e.gsm8k import ROOT
from tests.e2e.harness import Run

pytestmark = [pytest.mark.learn, pytest.mark.timeout(3600)]
RECIPE = ROOT / "recipes" / "tool-calculator-tiny"


def test_a_model_learns_to_call_the_calculator(tmp_path: Path) -> None:
    """The reward of training episodes, and the tool's calls with it, from below 0.5 to above 0.7."""
    task = tmp_path / "task"
    subprocess.run([sys.executable, RECIPE / "make_model.py", task], check=True, capture_output=True)
    common = [f"output_root={tmp_path / 'runs'}", "cluster.placement=local"]
    sft = Run.submit(
        RECIPE / "sft.yaml",
        f"model.path={task / 'model'}",
        f"data.train.path={task / 'train_sft.jsonl'}",
        *common,
    )
    sft.complete(1500)
    files = [f"data.{part}.path={task / part}.jsonl" for part in ("train", "eval")]
    run = Run.submit(
        RECIPE / "grpo.yaml", f"model.path={sft.root / 'safetensors' / 'final'}", *files, *common
    )
    run.complete(1500)
    rows = [row for row in run.metrics() if "rollout/reward_mean" in row]
    for name in ("rollout/reward_mean", "rollout/tool_calls"):
        print(curve([(row["step"], row[name]) for row in rows], title=f"{name} by step"))
    first = sum(row["rollout/reward_mean"] for row in rows[:2]) / 2
    last = sum(row["rollout/reward_mean"] for row in rows[-3:]) / 3
    accuracy = [row["eval/accuracy"] for row in run.metrics() if "eval/accuracy" in row]
    print(
        f"reward {first:.3f} -> {last:.3f}, held-out greedy accuracy {accuracy[0]:.3f} -> {accuracy[-1]:.3f}"
    )
    assert first < 0.5
    assert last > 0.7
    assert accuracy[0] < 0.5
    assert accuracy[-1] > 0.85
    assert rows[-1]["rollout/tool_calls"] > 0.7
    # Before any push both sides have the same weights: two turns, token for token the same sequence.
    assert rows[0]["train/mismatch_max"] < 1e-5
