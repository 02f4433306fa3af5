"""`hpc-rl eval` on whole runs under `placement: local`: it measures what the run measured of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e import tiny
from tests.e2e.harness import Run, hpc_rl, read_jsonl

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.slow]
COLUMNS = {"prompt": "question", "answer": "answer", "completion": "answer"}


def evaluated(run: Run, *words: str) -> dict:
    return json.loads(hpc_rl("eval", run.root, *words, "--follow", "--json", timeout_s=240))


def test_rl_checkpoints_score_as_they_did_in_the_run(workspace: Path) -> None:
    data = {"eval": {"path": str(workspace / "eval.jsonl"), "format": "prompt_answer", **COLUMNS}}
    recipe = tiny.rl_recipe(
        workspace, policy={"steps": 2, "optimizer": {"lr": 1e-2}}, data=data,
        checkpoint={"save_every": 1, "export": "off", "max_keep": -1}, eval={"every": 1, "before": False},
    )  # fmt: skip
    run = Run.submit(recipe)
    run.complete()
    rows = {row["step"]: row for row in run.metrics()}
    measured = ["eval/accuracy", "eval/digits", "eval/pass@1", "eval/length_mean", "eval/prompts"]
    assert rows[1]["eval/digits"] != rows[2]["eval/digits"], "the steps can be told apart"

    found = evaluated(run, "--step", "1")
    assert found["state"] == "COMPLETED", found
    assert {name: found["metrics"][name] for name in measured} == {name: rows[1][name] for name in measured}
    folder = Path(found["run_dir"])
    assert folder.parent.parent == run.root / "eval"
    assert not (folder / "logs" / "attempt_1" / "policy_0.log").exists(), "no policy was started"
    assert (folder / "safetensors" / "step_00000001" / "config.json").is_file(), "exported by the job itself"
    assert not list((folder / "checkpoints").iterdir())
    answers = read_jsonl(folder / "samples" / "evaluation.jsonl")
    assert len(answers) == found["metrics"]["eval/prompts"]
    assert all(len(row["samples"]) == 1 and row["answer"] for row in answers)

    checkpoint = run.root / "checkpoints" / "step_00000002"
    words = ("eval", checkpoint, "eval.samples=4", "eval.temperature=1", "--follow", "--json")
    found = json.loads(hpc_rl(*words, timeout_s=240))
    assert {"eval/pass@1", "eval/pass@2", "eval/pass@4"} <= found["metrics"].keys()
    listed = json.loads(hpc_rl("eval", run.root, "--list", "--json"))
    assert [item["name"] for item in listed] == ["step_00000001", "step_00000002"]
    assert "step_00000002" in hpc_rl("eval", run.root, "--list")


def test_sft_runs_get_their_loss_and_with_a_reward_scored_answers(workspace: Path) -> None:
    data = {"eval": {"path": str(workspace / "eval.jsonl"), "format": "prompt_completion", **COLUMNS}}
    run = Run.submit(tiny.sft_recipe(workspace, policy={"steps": 2}, data=data, eval={"before": False}))
    run.complete()
    found = evaluated(run)
    assert found["name"] == "final"
    own = next(row for row in run.metrics() if row["step"] == 2)
    assert found["metrics"]["eval/loss"] == pytest.approx(own["eval/loss"], abs=1e-5)
    assert found["metrics"]["eval/tokens"] == own["eval/tokens"]
    plugin = Path(__file__).with_name("digits_reward.py")
    words = [f"plugins=[{plugin}]", "reward=[{name: digits}]", "rollout.max_tokens=4", "data.eval.limit=3"]
    found = evaluated(run, "--step", "2", *words)
    assert found["state"] == "COMPLETED", found
    assert found["metrics"]["eval/prompts"] == 3
    assert 0 <= found["metrics"]["eval/digits"] <= 1
