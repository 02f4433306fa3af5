"""SFT on real text (GSM8K) must lower the loss on rows that it never sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.telemetry.curve import curve
from tests.e2e.gsm8k import DATA, TINY
from tests.e2e.harness import Run

COLUMNS = "format: prompt_completion, prompt: question, completion: answer"
pytestmark = [pytest.mark.learn, pytest.mark.timeout(1800)]


def test_gsm8k_sft_lowers_the_held_out_loss(tmp_path: Path) -> None:
    """To less than 0.6 of what it was before training, in nats per token of the worked solutions."""
    make = [sys.executable, str(TINY / "make_model.py"), str(tmp_path / "tiny"), "--data", str(DATA)]
    subprocess.run(make, check=True, capture_output=True, timeout=300)
    run = Run.submit(
        TINY / "sft.yaml",
        f"model.path={tmp_path / 'tiny' / 'model'}",
        f"data.train.path={DATA / 'train.jsonl'}",
        f"data.eval={{path: {DATA / 'test.jsonl'}, {COLUMNS}}}",
        "policy.steps=200",
        "policy.optimizer.schedule=cosine",
        "eval.every=50",
        f"output_root={tmp_path / 'runs'}",
        "cluster.placement=local",
    )
    run.complete(1200)
    losses = [(row["step"], row["eval/loss"]) for row in run.metrics() if "eval/loss" in row]
    print(curve(losses, title="eval/loss by step"))
    first, best = losses[0][1], min(loss for _, loss in losses)
    print(f"held-out loss {first:.3f} -> {losses[-1][1]:.3f} (best {best:.3f})")
    assert losses[0][0] == 0
    assert losses[-1][0] == 200
    assert best < 0.6 * first
