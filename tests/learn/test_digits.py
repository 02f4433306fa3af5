"""A vision-language model learns from real images through the whole of `hpc-rl` (`make learn`)."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.telemetry.curve import curve
from hpc_rl.telemetry.metrics import read_metrics, series
from tests.e2e.gsm8k import ROOT

pytestmark = [pytest.mark.learn, pytest.mark.timeout(3600)]
RECIPE = ROOT / "recipes" / "digits-vlm"
GAIN = 0.1  # of accuracy (its standard error is 0.03), and of the mean reward


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def held_out_accuracy(model: Path, data: Path) -> float:
    said = run(sys.executable, RECIPE / "evaluate.py", model, data / "eval.json")
    found = re.search(r"accuracy ([0-9.]+) \(299 images\)", said)
    assert found is not None, said
    return float(found[1])


def submit(recipe: str, tmp_path: Path, model: Path, data: Path, *options: str) -> Path:
    """The folder of a run that completed."""
    hpc_rl = Path(sys.executable).with_name("hpc-rl")
    where = [f"model.path={model}", f"output_root={tmp_path / 'runs'}", "cluster.placement=local"]
    where += [f"data.{part}.path={data / part}.json" for part in ("train", "eval")]
    run(hpc_rl, "submit", RECIPE / recipe, *where, *options, "--site", "local", "--follow")
    (run_dir,) = (tmp_path / "runs" / f"digits-vlm-{recipe.removesuffix('.yaml')}").iterdir()
    assert json.loads(run(hpc_rl, "status", run_dir, "--json"))["state"] == "COMPLETED"
    return run_dir


def test_a_vlm_learns_to_read_digits(tmp_path: Path) -> None:
    """Held-out accuracy of the export through plain Transformers: from at most chance to above 0.9."""
    data, model = tmp_path / "data", tmp_path / "model"
    run(sys.executable, RECIPE / "make_data.py", data)
    run(sys.executable, RECIPE / "make_model.py", model)
    before = held_out_accuracy(model, data)
    run_dir = submit("sft.yaml", tmp_path, model, data)
    rows = read_metrics(run_dir / "metrics.jsonl")
    print(curve(series(rows, "train/loss"), title="loss by step"))
    after = held_out_accuracy(run_dir / "safetensors" / "final", data)
    print(f"held-out accuracy {before:.3f} -> {after:.3f}")
    assert before < 0.2
    assert after > 0.9


def test_a_vlm_learns_to_read_digits_by_reward(tmp_path: Path) -> None:
    """GRPO on images, after an SFT that is too short to read well: held-out accuracy and sampled reward."""
    data, model = tmp_path / "data", tmp_path / "model"
    run(sys.executable, RECIPE / "make_data.py", data)
    run(sys.executable, RECIPE / "make_model.py", model)
    short = ["policy.epochs=2", "eval.every=0", "eval.before=false"]
    start = submit("sft.yaml", tmp_path, model, data, *short) / "safetensors" / "final"
    run_dir = submit("grpo.yaml", tmp_path, start, data)
    rows = read_metrics(run_dir / "metrics.jsonl")
    print(curve(series(rows, "rollout/reward_mean"), title="reward by step"))
    rewards = [row["rollout/reward_mean"] for row in rows if row["step"] > 0]
    before, after = (held_out_accuracy(folder, data) for folder in (start, run_dir / "safetensors" / "final"))
    print(f"held-out accuracy {before:.3f} -> {after:.3f}")
    assert after > before + GAIN
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + GAIN
