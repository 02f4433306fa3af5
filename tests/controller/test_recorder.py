"""The job's comment follows the metrics, not too often, and shows the last step in the end."""

from __future__ import annotations

from pathlib import Path

from hpc_rl.controller.recorder import Recorder


def test_the_comment_is_not_set_at_each_step_but_ends_with_the_last(tmp_path: Path) -> None:
    comments: list[str] = []
    recorder = Recorder(tmp_path / "metrics.jsonl", 1, 30, None, comments.append)
    for step in range(1, 31):
        recorder.step(step, {"rollout/reward_mean": 0.5})
    recorder.close(10.0)
    assert [text.split()[0] for text in comments] == ["1/30", "30/30"]
