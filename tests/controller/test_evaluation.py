"""When evaluations are due, what they count, and that the metrics keep one row per step around them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.controller.evaluation import Evaluator
from hpc_rl.controller.recorder import Recorder
from hpc_rl.controller.scores import Answer, evaluation_metrics, pass_at_k, pass_ks
from hpc_rl.recipe.schema import Eval
from hpc_rl.telemetry.metrics import read_metrics
from hpc_rl.types import Prompt, PromptGroup, Trajectory, VersionSpan


def make_evaluator(rows: int = 3, every: int = 5, before: bool = True, **options: float) -> Evaluator:
    prompts = [Prompt(ordinal=i, epoch=0, row=i, content="x") for i in range(rows)]
    settings = Eval(every=every, before=before, **options)
    return Evaluator(settings, prompts, primary="exact", max_tokens=8, seed=0)


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
    assert metrics["eval/prompts"] == 3.0
    assert metrics["eval/reward_mean"] == (1.5 + 0.5 + 0.0) / 3
    assert metrics["eval/pass@1"] == 1 / 3
    assert evaluator.current is None


def test_several_samples_per_prompt_each_with_a_seed_of_its_own_prompt() -> None:
    evaluator = make_evaluator(rows=2, samples=3, temperature=0.7, top_p=0.9)
    seeds = []
    for step in (0, 5):
        evaluator.begin(step)
        requests = [evaluator.next_request(0, 1), evaluator.next_request(0, 1)]
        assert [r.group_size for r in requests if r] == [3, 3]
        assert {(r.sampling.temperature, r.sampling.top_p) for r in requests if r} == {(0.7, 0.9)}
        seeds.append([r.sampling.seed for r in requests if r])
        evaluator.current = None
    assert seeds[0] == seeds[1], "two versions are compared on the same draws"
    assert len(set(seeds[0])) == 2


def enumerated(outcomes: list[bool], k: int) -> float:
    """The share of all choices of k samples that hold a success: what pass@k estimates, counted."""
    draws = list(itertools.combinations(outcomes, k))
    return sum(any(draw) for draw in draws) / len(draws)


def test_pass_at_k_is_the_share_of_all_choices_of_k_samples() -> None:
    assert pass_ks(1) == [1]
    assert pass_ks(8) == [1, 2, 4, 8]
    assert pass_ks(11) == [1, 2, 4, 8]
    for n, c in ((1, 0), (1, 1), (4, 1), (8, 3), (8, 8), (7, 0)):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(enumerated([i < c for i in range(n)], k), abs=1e-12)
    with pytest.raises(ValueError, match="pass@3 of 1 successes among 2"):
        pass_at_k(2, 1, 3)


def scored(*scores: float) -> list[Answer]:
    """Answers with these scores of `exact`; NaN: it could not be scored."""
    return [Answer(s, {} if math.isnan(s) else {"exact": s}, 4, "stop") for s in scores]


def test_unscored_samples_and_failed_prompts_are_failures_in_every_number() -> None:
    answers = [scored(1.0, 0.5, math.nan, 0.0), scored(0.0, 0.0, 0.0, 0.0)]
    options = {"failed": 1, "samples": 4, "primary": "exact"}
    metrics = evaluation_metrics(answers, threshold=1.0, **options)
    assert metrics["eval/accuracy"] == metrics["eval/reward_mean"] == 1.5 / 12
    assert metrics["eval/pass@1"] == pytest.approx((1 / 4) / 3)
    assert metrics["eval/pass@2"] == pytest.approx((1 / 2) / 3)
    assert metrics["eval/pass@4"] == pytest.approx(1 / 3)
    assert metrics["eval/unscored"] == pytest.approx(5 / 12)
    assert evaluation_metrics(answers, threshold=0.5, **options)["eval/pass@4"] == pytest.approx(1 / 3)
    lower = evaluation_metrics(answers, threshold=-1.0, **options)
    assert lower["eval/pass@1"] == pytest.approx((3 / 4 + 1 + 0) / 3), "what has no score cannot succeed"


def test_an_evaluation_that_measured_nothing_has_no_accuracy() -> None:
    metrics = evaluation_metrics([scored(math.nan)], failed=2, samples=1, primary="exact", threshold=1.0)
    assert metrics == {"eval/prompts": 3.0, "eval/failed": 2.0, "eval/unscored": 1.0}


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
