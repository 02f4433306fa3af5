"""A whole run of GRPO on pictures, a clip and text (`placement: local`, tiny Qwen3-VL, `hf` engine)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import vision_prompts as v
from tests.e2e import tiny
from tests.e2e.harness import Run

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.slow]


def test_grpo_trains_and_evaluates_on_media(tmp_path: Path) -> None:
    """Pixels are read on both sides: the learner's log-probs are the sampler's, also of version 1."""
    v.save_model(tmp_path / "model", "qwen3_vl")
    data = v.spec_of(v.write_rows(tmp_path / "data")).model_dump(exclude_defaults=True)
    recipe = tiny.rl_recipe(
        tmp_path,
        name="tiny-vision",
        data={"train": {"prompt": "prompt", "answer": "answer", **data}, "eval": data},
        policy={"batch_size": 16, "steps": 2},
        algorithm={"max_staleness": 0},
        checkpoint={"save_every": 2, "export": "off"},
        eval={"every": 2, "before": False},
    )
    run = Run.submit(recipe)
    assert run.complete()["step"] == 2
    rows = [row for row in run.metrics() if row["step"] > 0]
    assert [row["train/sequences"] for row in rows] == [16, 16]
    assert [row["rollout/dropped"] for row in rows] == [0, 0]
    assert max(row["train/mismatch_max"] for row in rows) < 1e-5
    assert rows[-1]["weights/bytes"] > 0
    assert "eval/accuracy" in rows[-1]
