"""The GSM8K path end to end, briefly: real text, real Slurm, real vLLM. `tests/learn` runs it to the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.gsm8k import run_gsm8k

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.vllm,
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


def test_the_gsm8k_recipe_runs_on_a_tiny_model_with_vllm(devcluster, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors import safe_open

    run = run_gsm8k(
        devcluster,
        tmp_path,
        sft=("policy.steps=6",),
        grpo=("policy.steps=3", "policy.batch_size=16", "data.eval.limit=4", "checkpoint.save_every=2"),
    )
    rows = run.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert {"eval/accuracy", "eval/format", "eval/gsm8k"} <= rows[0].keys()
    assert rows[-1]["eval/prompts"] == 4
    assert all(row["rollout/staleness_max"] <= 2 for row in rows[1:])
    # Same-version tokens agree between vLLM and the trainer; older ones differ by the updates between.
    fresh = [row for row in rows[1:] if row["rollout/staleness_max"] == 0]
    assert fresh
    assert all(row["train/mismatch_mean"] < 1e-6 and row["train/mismatch_max"] < 1e-5 for row in fresh)
    with safe_open(run.root / "safetensors" / "final" / "model.safetensors", "pt") as file:
        assert "model.embed_tokens.weight" in set(file.keys())
