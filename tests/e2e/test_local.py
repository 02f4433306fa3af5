"""Whole runs under `placement: local`: real supervisor, Redis, controller, FSDP2 policy, `hf` rollouts."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.e2e import tiny
from tests.e2e.harness import Run

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.slow]


def final_weights(run: Run) -> dict:
    from safetensors.torch import load_file

    return {
        name: tensor
        for file in sorted((run.root / "safetensors" / "final").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_bits(one: Run, other: Run, *metrics: str) -> None:
    """Both runs have the same numbers at each step and the same final weights, to the bit."""
    import torch

    for name in metrics:
        ours = [(row["step"], row[name]) for row in one.metrics() if row["step"]]
        theirs = [(row["step"], row[name]) for row in other.metrics() if row["step"]]
        assert ours == theirs, name
    left, right = final_weights(one), final_weights(other)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert different == []


def assert_trained_once(run: Run, total: int) -> None:
    """The ledger of the surviving lineage has every ordinal once, and the metrics every step once."""
    trained = [ordinal for entry in run.ledger() for ordinal in entry["trained"]]
    dropped = [int(ordinal) for entry in run.ledger() for ordinal in entry["dropped"]]
    assert sorted(trained + dropped) == list(range(total))
    steps = [row["step"] for row in run.metrics() if row["step"] > 0]
    assert steps == sorted(set(steps))


def stop_somewhere_and_resume(run: Run, rng: random.Random, last: int) -> int:
    """`cancel` once a random step is done, then `resume`; the step it was."""
    step = rng.randint(2, last)
    run.wait_for_step(step)
    run.cancel()
    assert run.wait()["state"] == "CANCELLED"
    run.resume()
    return step


def test_sft_runs_to_its_end_and_the_export_loads(workspace: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = Run.submit(tiny.sft_recipe(workspace))
    status = run.complete()
    assert (status["step"], status["total_steps"], status["attempt"]) == (10, 10, 1)
    losses = [row["train/loss"] for row in run.metrics()]
    assert [row["step"] for row in run.metrics()] == list(range(1, 11))
    assert losses[-1] < losses[0]
    assert sorted(p.name for p in (run.root / "checkpoints").iterdir()) == ["step_00000008", "step_00000010"]
    final = run.root / "safetensors" / "final"
    AutoModelForCausalLM.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final).decode([32]) == "s"
    written = run.root / "report.html"  # just after the attempt is closed
    deadline = time.monotonic() + 10
    while not written.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    report = written.read_text()
    assert "<td>done</td><td>0</td>" in report, "the attempt as it ended"
    assert "None" not in report


def test_sft_stopped_anywhere_resumes_to_the_same_bits(workspace: Path) -> None:
    columns = {"format": "prompt_completion", "prompt": "question", "completion": "answer"}
    optimizer = {"lr": 1e-3, "schedule": "cosine", "min_lr": 1e-5, "groups": [{"match": "norm", "lr": 1e-4}]}
    recipe = tiny.sft_recipe(
        workspace,
        policy={"steps": 24, "ema": {"decay": 0.9}, "optimizer": optimizer, "guard": {"spike": 20.0}},
        data={"eval": {"path": str(workspace / "eval.jsonl"), **columns}},
        eval={"every": 3, "before": True},
    )
    whole = Run.submit(recipe)
    status = whole.complete()
    validated = {row["step"]: row["eval/loss"] for row in whole.metrics() if "eval/loss" in row}
    assert list(validated) == [0, 3, 6, 9, 12, 15, 18, 21, 24]
    best = min((step for step in validated if step), key=lambda step: validated[step])
    assert status["best"] == {"step": best, "metric": "eval/loss", "value": validated[best]}
    assert (whole.root / "checkpoints" / f"step_{best:08d}" / "COMPLETE").is_file()
    broken = Run.submit(recipe)
    stop_somewhere_and_resume(broken, random.Random(0), last=12)
    status = broken.complete()
    assert status["attempt"] == 2
    assert status["best"]["step"] == best
    assert_same_bits(whole, broken, "train/loss", "train/grad_norm")
    assert {row["step"]: row["eval/loss"] for row in broken.metrics() if "eval/loss" in row} == validated


def test_synchronous_rl_stopped_anywhere_resumes_to_the_same_bits(workspace: Path) -> None:
    """And evaluations, here of several samples in the run that is stopped, change no bit of the training."""
    changes = {"algorithm": {"max_staleness": 0}, "policy": {"steps": 8}}
    whole = Run.submit(tiny.rl_recipe(workspace, **changes))
    whole.complete()
    evaluated = {"path": str(workspace / "eval.jsonl"), "prompt": "question", "answer": "answer", "limit": 3}
    sampled = {"every": 2, "before": True, "samples": 2, "temperature": 1.0}
    broken = Run.submit(tiny.rl_recipe(workspace, **changes, data={"eval": evaluated}, eval=sampled))
    stop_somewhere_and_resume(broken, random.Random(1), last=5)
    broken.complete()
    assert_same_bits(whole, broken, "train/loss", "rollout/reward_mean")
    scored = [row for row in broken.metrics() if "eval/pass@2" in row]
    assert [row["step"] for row in scored] == [0, 2, 4, 6, 8]
    assert all(row["eval/prompts"] == 3 and row["eval/unscored"] == 0 for row in scored)
    assert_trained_once(broken, 16)
    assert any(row["train/loss"] != 0 for row in broken.metrics() if row["step"])
    assert all(row["rollout/staleness_max"] == 0 for row in broken.metrics() if row["step"])


def test_asynchronous_rl_loses_and_repeats_no_prompt_of_the_epoch(workspace: Path) -> None:
    recipe = tiny.rl_recipe(
        workspace,
        policy={"steps": None, "epochs": 1},
        algorithm={"max_staleness": 2},
        rollout={"replicas": 2},
        data={"eval": {"path": str(workspace / "eval.jsonl"), "prompt": "question", "answer": "answer"}},
        eval={"before": True, "every": 4},
    )
    run = Run.submit(recipe)
    stop_somewhere_and_resume(run, random.Random(2), last=8)
    status = run.complete()
    assert status["total_steps"] == 12
    assert_trained_once(run, 24)
    rows = sorted(row for entry in run.ledger() for row in entry["rows"])
    assert rows == list(range(24)), "one epoch: every row of the data once"
    assert max(row.get("rollout/staleness_max", 0) for row in run.metrics()) <= 2
    assert [row["step"] for row in run.metrics() if "eval/accuracy" in row] == [0, 4, 8, 12]


def test_cancel_save_stops_at_a_step_and_resume_goes_on_from_there(workspace: Path) -> None:
    run = Run.submit(tiny.sft_recipe(workspace, policy={"steps": 400}, checkpoint={"save_every": 1000}))
    run.wait_for_step(3)
    run.cancel("--save")
    status = run.wait()
    assert status["state"] == "CANCELLED"
    saved = [path.name for path in (run.root / "checkpoints").iterdir()]
    assert saved == [f"step_{status['step']:08d}"]
    run.resume(f"policy.steps={status['step'] + 2}")
    assert run.complete()["step"] == status["step"] + 2
    steps = [row["step"] for row in run.metrics()]
    assert steps == list(range(1, status["step"] + 3))


def test_a_file_that_is_missing_on_the_node_ends_the_attempt_and_is_named(workspace: Path) -> None:
    run = Run.submit(tiny.sft_recipe(workspace))
    (workspace / "model" / "config.json").rename(workspace / "elsewhere.json")  # after all checks passed
    status = run.wait(60)
    assert status["state"] == "FAILED"
    assert status["first_cause"].startswith("policy 0 (load): ")
    assert str(workspace / "model") in status["first_cause"]
