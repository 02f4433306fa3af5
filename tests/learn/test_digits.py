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


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def held_out_accuracy(model: Path, data: Path) -> float:
    said = run(sys.executable, RECIPE / "evaluate.py", model, data / "eval.json")
    found = re.search(r"accuracy ([0-9.]+) \(299 images\)", said)
    assert found is not None, said
    return float(found[1])


def test_a_vlm_learns_to_read_digits(tmp_path: Path) -> None:
    """Held-out accuracy of the export through plain Transformers: from at most chance to above 0.9."""
    data, model = tmp_path / "data", tmp_path / "model"
    run(sys.executable, RECIPE / "make_data.py", data)
    run(sys.executable, RECIPE / "make_model.py", model)
    before = held_out_accuracy(model, data)
    hpc_rl = Path(sys.executable).with_name("hpc-rl")
    options = [f"model.path={model}", f"output_root={tmp_path / 'runs'}", "cluster.placement=local"]
    options += [f"data.{part}.path={data / part}.json" for part in ("train", "eval")]
    run(hpc_rl, "submit", RECIPE / "sft.yaml", *options, "--site", "local", "--follow")
    (run_dir,) = (tmp_path / "runs" / "digits-vlm-sft").iterdir()
    assert json.loads(run(hpc_rl, "status", run_dir, "--json"))["state"] == "COMPLETED"
    rows = read_metrics(run_dir / "metrics.jsonl")
    print(curve(series(rows, "train/loss"), title="loss by step"))
    after = held_out_accuracy(run_dir / "safetensors" / "final", data)
    print(f"held-out accuracy {before:.3f} -> {after:.3f}")
    assert before < 0.2
    assert after > 0.9
