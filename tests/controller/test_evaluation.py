"""When evaluations are due, what they count, and that the metrics keep one row per step around them."""

from __future__ import annotations

from pathlib import Path

from hpc_rl.bus import messages as m
from hpc_rl.controller.evaluation import Evaluator
from hpc_rl.controller.recorder import Recorder
from hpc_rl.recipe.schema import Eval
from hpc_rl.telemetry.metrics import read_metrics
from hpc_rl.types import Prompt, PromptGroup, Trajectory, VersionSpan


def make_evaluator(rows: int = 3, every: int = 5, before: bool = True) -> Evaluator:
    prompts = [Prompt(ordinal=i, epoch=0, row=i, content="x") for i in range(rows)]
    return Evaluator(Eval(every=every, before=before), prompts, primary="exact", max_tokens=8, seed=0)


def answer(request: m.Generate, replica: int, score: float) -> m.GroupDone:
    trajectory = Trajectory(
        ordinal=request.prompt.ordinal, sample=0, replica=replica, prompt_ids=[1], token_ids=[2, 3],
        log_probs=[0.0, 0.0], spans=[VersionSpan(0, 0, 2)], finish="stop",
        rewards={"exact": score, "format": 1.0}, reward=score + 0.5,
    )  # fmt: skip
    return m.GroupDone(replica, 1, "eval", request.tag, PromptGroup(request.prompt, [trajectory]))


def test_due_before_every_n_steps_and_at_the_end() -> None:
    evaluator = make_evaluator(every=5)
    assert [s for s in range(13) if evaluator.due(s, 12)] == [0, 5, 10, 12]
    assert [s for s in range(13) if make_evaluator(every=0, before=False).due(s, 12)] == [12]
    assert not make_evaluator(rows=0).due(0, 12)
    evaluator.begin(5)
    assert not evaluator.due(5, 12), "each version is evaluated once"


def test_accuracy_counts_failed_prompts_as_wrong_and_lost_ones_again() -> None:
    evaluator = make_evaluator(rows=3)
    evaluator.begin(0)
    requests = [evaluator.next_request(0, 1), evaluator.next_request(1, 1)]
    assert all(request is not None and request.sampling.temperature == 0.0 for request in requests)
    evaluator.give_back(1)
    assert evaluator.answered(answer(requests[1], 1, 1.0)) is None, "of a lost replica: ignored"
    again, last = evaluator.next_request(0, 1), evaluator.next_request(0, 1)
    assert again is not None and last is not None
    assert evaluator.next_request(0, 1) is None
    assert evaluator.answered(answer(requests[0], 0, 1.0)) is None
    assert evaluator.answered(answer(again, 0, 0.0)) is None
    failed = m.GroupFailed(0, 1, "eval", last.tag, last.prompt.ordinal, "no such row")
    metrics = evaluator.answered(failed)
    assert metrics is not None
    assert metrics["eval/accuracy"] == metrics["eval/exact"] == 1 / 3
    assert metrics["eval/failed"] == 1.0
    assert evaluator.current is None


def test_rows_wait_for_an_evaluation_and_are_written_in_order(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "metrics.jsonl", attempt=1, total=9)
    recorder.step(1, {"train/loss": 1.0})
    recorder.hold(2)
    recorder.step(2, {"train/loss": 2.0})
    recorder.step(3, {"train/loss": 3.0})
    assert [row["step"] for row in read_metrics(recorder.log.path)] == [1]
    recorder.release(2, {"eval/accuracy": 0.5})
    rows = read_metrics(recorder.log.path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["eval/accuracy"] == 0.5
    assert rows[1]["train/loss"] == 2.0
    assert recorder.written(2)
    assert not recorder.written(4)


def test_held_rows_survive_through_a_checkpoint(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "metrics.jsonl", attempt=1, total=9)
    first.hold(2)
    first.step(2, {"train/loss": 2.0})
    kept = {int(step): dict(row) for step, row in first.held_rows.items()}
    second = Recorder(tmp_path / "metrics.jsonl", attempt=2, total=9)
    second.restore(kept)
    second.hold(2)
    second.release(2, {"eval/accuracy": 0.5})
    assert [row["step"] for row in read_metrics(second.log.path)] == [2]
    third = Recorder(tmp_path / "metrics.jsonl", attempt=3, total=9)
    third.restore(kept)  # the same checkpoint again: its row was written after it
    third.flush()
    assert [row["step"] for row in read_metrics(third.log.path)] == [2]
