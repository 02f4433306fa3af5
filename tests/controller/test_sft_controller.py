"""SFT's controller: evaluations at just the step they are for, and the best checkpoint kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.controller.best import BestCheckpoint
from hpc_rl.run.best import Best, best_file, improves, read_best, write_best
from hpc_rl.run.paths import RunDir
from hpc_rl.telemetry.metrics import read_metrics
from tests.controller.sft_simulation import Policy, make_controller, write_policy_part

LOSSES = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 3.2}  # step 4 is the best
SECTIONS: dict[str, Any] = {
    "eval": {"every": 2, "before": True},
    "checkpoint": {"save_every": 5, "max_keep": 1, "export": "off"},
}


def make_run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "simulated")


def whole(run: RunDir, sections: dict[str, Any]) -> Policy:
    policy = Policy(make_controller(run, **sections), LOSSES.__getitem__)
    assert policy.run(), "it hangs"
    return policy


def test_evaluations_come_just_after_their_step_and_only_what_is_due_or_best_is_saved(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    policy = whole(run, SECTIONS)
    assert policy.log == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("save", 2), ("train", 3), ("train", 4),
        ("eval", 4), ("save", 4), ("train", 5), ("save", 5), ("train", 6), ("eval", 6), ("train", 7),
        ("train", 8), ("eval", 8), ("train", 9), ("train", 10), ("eval", 10), ("save", 10),
    ]  # fmt: skip
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows] == list(range(11))
    assert {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row} == LOSSES


def test_the_best_checkpoint_outlives_newer_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path)
    with caplog.at_level(logging.INFO):
        whole(run, SECTIONS)
    assert run.complete_steps() == [4, 10]
    assert json.loads(best_file(run).read_text()) == {"step": 4, "metric": "eval/loss", "value": 3.0}
    assert f"best checkpoint: step 4 (eval/loss 3): {run.checkpoint(4)}" in caplog.text


def test_without_keep_best_only_the_newest_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sections = {**SECTIONS, "checkpoint": {**SECTIONS["checkpoint"], "keep_best": False}}
    policy = whole(run, sections)
    assert [step for what, step in policy.log if what == "save"] == [5, 10]
    assert run.complete_steps() == [10]
    assert not best_file(run).exists()


def test_no_validation_data_no_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    policy = Policy(make_controller(run, **SECTIONS), LOSSES.__getitem__, eval_rows=0)
    assert policy.run()
    assert [step for what, step in policy.log if what != "train"] == [5, 10]


@pytest.mark.parametrize("cut", range(1, 10))
def test_it_goes_on_from_any_crash_with_the_same_best(tmp_path: Path, cut: int) -> None:
    """The controller is lost right after step `cut`, whatever was under way."""
    run = make_run(tmp_path)
    first = Policy(make_controller(run, **SECTIONS), LOSSES.__getitem__)
    assert first.run(lambda: first.step == cut)
    newest = run.latest_complete() or 0
    second = Policy(make_controller(run, attempt=2, **SECTIONS), LOSSES.__getitem__, step=newest)
    assert second.run()
    assert run.complete_steps() == [4, 10]
    assert read_best(run) == Best(4, "eval/loss", 3.0)
    rows = read_metrics(run.metrics)
    assert [row["step"] for row in rows] == list(range(11))
    assert {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row} == LOSSES


def test_a_stop_waits_for_the_loss_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    controller = make_controller(run, **SECTIONS)
    policy = Policy(controller, LOSSES.__getitem__)
    assert policy.run(lambda: policy.step == 4)  # its evaluation is in the inbox
    controller.interrupt("walltime")
    assert policy.run()
    assert policy.log[-2:] == [("eval", 4), ("save", 4)]
    assert controller.ending == (75, "walltime")
    assert read_best(run) == Best(4, "eval/loss", 3.0)


def test_a_best_that_was_rolled_back_is_replaced_by_the_best_that_is_left(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rows = [{"step": s, "time": 0.0, "attempt": 1, "eval/loss": v} for s, v in LOSSES.items()]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (2, 4, 6):
        write_policy_part(run.checkpoint(step))
        (run.checkpoint(step) / "COMPLETE").write_text("{}")
    write_best(run, Best(4, "eval/loss", 3.0))
    best = BestCheckpoint(run, enabled=True)
    best.restore(6, "eval/loss")
    assert best.best == Best(4, "eval/loss", 3.0)
    write_best(run, Best(6, "eval/accuracy", 1.0))
    best.restore(6, "eval/loss")  # resumed with another eval.best
    assert best.best == Best(4, "eval/loss", 3.0)
    best.restore(2, "eval/loss")
    assert best.best == read_best(run) == Best(2, "eval/loss", 5.0)


def test_a_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path: Path) -> None:
    best = BestCheckpoint(make_run(tmp_path), enabled=True)
    assert best.judge(2, "eval/loss", 5.0)
    assert best.protected == {2}
    best.failed(2)
    assert best.protected == set()
    assert best.judge(4, "eval/loss", 6.0)


def test_improves() -> None:
    assert improves("eval/loss", 1.0, None)
    assert improves("eval/loss", 1.0, Best(1, "eval/loss", 2.0))
    assert not improves("eval/loss", 2.0, Best(1, "eval/loss", 2.0))
    assert improves("eval/accuracy", 0.6, Best(1, "eval/accuracy", 0.5))
    assert not improves("eval/accuracy", 0.4, Best(1, "eval/accuracy", 0.5))
    assert not improves("eval/loss", float("nan"), None)
    assert improves("eval/loss", 2.0, Best(1, "eval/loss", 1.0), "max")
