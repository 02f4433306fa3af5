"""A whole run with a reward model and a teacher in groups of their own, one of which is killed on the way."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.e2e import tiny
from tests.e2e.harness import Run

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.slow]


def make_reward_model(folder: Path) -> Path:
    """A random sequence classifier over the characters of the policy's tokenizer."""
    import torch
    import transformers as T

    tokenizer = T.AutoTokenizer.from_pretrained(folder.parent / "model")
    torch.manual_seed(3)
    config = T.AutoConfig.from_pretrained(folder.parent / "model", num_labels=1, initializer_range=0.3)
    T.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pid_of(run: Run, who: str) -> int:
    """The process of the latest incarnation of `who`, by the controller's log."""
    log = (run.root / "logs" / "latest" / "controller.log").read_text()
    return int(re.findall(rf"{who} registered \(pid (\d+) on", log)[-1])


def test_rollouts_ask_a_reward_model_and_a_teacher_and_a_killed_one_costs_no_sample(workspace: Path) -> None:
    reward = make_reward_model(workspace / "reward")
    teacher = tiny.make_model(workspace / "teacher", seed=5)
    recipe = tiny.rl_recipe(
        workspace,
        plugins=[],
        reward=[
            {"name": "model", "path": str(reward), "dtype": "float32", "weight": 2.0},
            {"name": "exact", "weight": 0.5},
        ],
        algorithm={"name": "distill"},
        teacher={"path": str(teacher), "dtype": "float32"},
        policy={"steps": 8},
        data={"eval": {"path": str(workspace / "eval.jsonl"), "prompt": "question", "answer": "answer"}},
        eval={"every": 4, "before": False},
    )
    run = Run.submit(recipe)
    run.wait_for_step(2)
    os.kill(pid_of(run, "reward 0"), signal.SIGKILL)
    status = run.complete()
    assert (status["step"], status["attempt"]) == (8, 1)
    (lost,) = run.events("replica_lost")
    assert (lost["role"], lost["index"]) == ("reward", 0)
    rows = run.metrics()
    assert [row["rollout/unscored"] for row in rows] == [0.0] * 8
    for row in rows:
        total = 2.0 * row["reward/model"] + 0.5 * row["reward/exact"]
        assert row["rollout/reward_mean"] == pytest.approx(total, abs=1e-6)
    assert len({row["reward/model"] for row in rows}) == 8
    assert [row["step"] for row in rows if "eval/model" in row] == [4, 8]
    assert any(row["train/loss"] != 0 for row in rows)
    logs = run.root / "logs" / "latest"
    assert "Qwen2ForSequenceClassification" in (logs / "reward_0.log").read_text()
