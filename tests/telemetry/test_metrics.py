"""metrics.jsonl: rows, torn lines, rollback, the surviving lineage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rl.telemetry.console import duration, eta_of_rows, job_comment, step_line
from hpc_rl.telemetry.metrics import (
    MetricsError,
    MetricsLog,
    last_step,
    latest,
    make_row,
    read_metrics,
    series,
    surviving,
    tail_rows,
)


def test_rows_are_written_and_read(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    log.append(1, {"train/loss": 0.5, "train/tokens": 12})
    log.append(2, {"train/loss": float("nan")})
    rows = read_metrics(log.path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["train/tokens"] == 12
    assert rows[1]["train/loss"] == "nan"  # strict JSON on disk
    assert series(rows, "train/loss") == [(1, 0.5)]
    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(f"not JSON: {text}"))


@pytest.mark.parametrize("values", [{"loss": 1.0}, {"train/loss": "many"}, {"train/loss": None}])
def test_bad_rows_are_refused(values: dict) -> None:
    with pytest.raises(MetricsError):
        make_row(1, 1, values)


def test_a_torn_line_is_skipped_and_ended_by_the_next_writer(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    log.append(1, {"train/loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"step": 2, "trai')
    assert [row["step"] for row in read_metrics(log.path)] == [1]
    MetricsLog(log.path, attempt=2).append(2, {"train/loss": 0.9})
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2]


def test_rolled_back_steps_are_moved_aside_not_lost(tmp_path: Path) -> None:
    first = MetricsLog(tmp_path / "metrics.jsonl", attempt=1)
    for step in range(6):
        first.append(step, {"train/loss": float(step)})
    second = MetricsLog(first.path, attempt=2)
    assert second.roll_back(3) == 2
    assert second.roll_back(3) == 0
    second.append(4, {"train/loss": 40.0})
    assert [row["step"] for row in read_metrics(first.path)] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics_rolled_back.jsonl")] == [4, 5]
    assert read_metrics(first.path)[-1]["attempt"] == 2


def test_the_surviving_lineage_has_each_step_once() -> None:
    rows = [
        {"step": 1, "attempt": 1, "train/loss": 1.0},
        {"step": 2, "attempt": 1, "train/loss": 2.0},
        {"step": 3, "attempt": 1, "train/loss": 3.0},
        {"step": 2, "attempt": 2, "train/loss": 20.0},
        {"step": 2, "attempt": 2, "eval/accuracy": 0.5},
        {"step": 3, "attempt": 2, "train/loss": 30.0},
    ]
    lineage = surviving(rows)
    assert [row["step"] for row in lineage] == [1, 2, 3]
    assert lineage[1] == {"step": 2, "attempt": 2, "train/loss": 20.0, "eval/accuracy": 0.5}
    assert latest(lineage) == {"train/loss": 30.0, "eval/accuracy": 0.5}


def test_the_tail_of_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "train/loss": n / 7}) + "\n" for n in range(5000)))
    assert [row["step"] for row in tail_rows(path, 3, block=512)] == [4997, 4998, 4999]
    assert last_step(path) == 4999
    assert tail_rows(tmp_path / "absent", 3) == []
    assert len(tail_rows(path, 10_000, block=4096)) == 5000


def test_step_line_and_job_comment() -> None:
    row = {
        "step": 95,
        "train/loss": 0.12345,
        "rollout/reward_mean": 0.54,
        "train/tokens": 3000,
        "time/step_s": 1.5,
    }
    assert step_line(row, 500) == "step 95/500 loss 0.1235 reward 0.540 tok/s 2,000 s 1.50"
    assert step_line({"step": 3, "train/loss": 1e-7}) == "step 3 loss 1.0e-07"
    sft = {"step": 2, "train/loss": 1.0, "train/lr": 1e-5, "train/tokens_per_s": 1500.4, "eval/loss": 2.0}
    assert step_line(sft, 4, 130.0) == "step 2/4 loss 1.0000 eval 2.0000 lr 1e-05 tok/s 1,500 eta 2m"
    assert job_comment(row, 500) == "95/500 reward=0.540 2000tok/s"
    assert job_comment({"step": 1, "train/loss": 2.0}) == "1 loss=2.0000"


def test_the_estimate_is_the_wall_clock_pace_of_the_newest_attempt() -> None:
    rows = [{"step": s, "time": 100.0 + 2 * s, "attempt": 1} for s in range(1, 5)]
    assert eta_of_rows(rows, 10) == pytest.approx(12.0)
    later = [{"step": s, "time": 9000.0 + 5 * s, "attempt": 2} for s in (5, 6)]
    assert eta_of_rows([*rows, *later], 10) == pytest.approx(20.0)
    assert eta_of_rows(rows, 4) is None
    assert eta_of_rows(rows[:1], 10) is None
    assert eta_of_rows([], 10) is None


def test_durations() -> None:
    found = [duration(s) for s in (5, 89, 90, 3600, 5400, 47.4 * 3600, 50 * 3600)]
    assert found == ["5s", "89s", "2m", "60m", "1h30m", "47h24m", "2d02h"]
