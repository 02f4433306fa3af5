"""The controllers of one evaluation alone: no policy for RL, one loss for SFT, and never a silent end."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.controller.eval_only import RlEvaluation, SftEvaluation
from hpc_rl.controller.members import AttemptFailed
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.evaluations import read_evaluated
from hpc_rl.run.paths import RunDir
from hpc_rl.types import PromptGroup, Trajectory, VersionSpan
from tests.controller.simulation import SentMessages


def make_role(folder: Path, **sections: Any) -> Any:
    run = RunDir.create(folder, "evaluated")
    rows = (json.dumps({"prompt": f"p{i}", "answer": str(i)}) for i in range(4))
    (run.root / "eval.jsonl").write_text("\n".join(rows) + "\n")
    recipe = Recipe.model_validate(
        {
            "name": "evaluated",
            "kind": "rl",
            "model": {"path": "none"},
            "data": {"train": {"path": "none"}, "eval": {"path": str(run.root / "eval.jsonl")}},
            "algorithm": {"name": "grpo"},
            "reward": [{"name": "exact"}],
            "rollout": {"replicas": 2, "max_in_flight": 2},
            "checkpoint": {"enabled": False, "export": "off"},
            "eval": {"only": True, "samples": 2, "temperature": 1.0},
            "logging": {"wandb": {"mode": "off"}},
            **sections,
        }
    )
    mesh = SimpleNamespace(world_size=1)
    return SimpleNamespace(
        recipe=recipe, plan=SimpleNamespace(mesh=mesh, groups=[]), run_dir=run, attempt=1,
        bus=SentMessages(), phase=lambda *_: None,
    )  # fmt: skip


def asked(role: Any, replica: int) -> list[m.Generate]:
    stream = role.bus.streams[m.inbox("rollout", replica)]
    found = [message for message in stream if isinstance(message, m.Generate)]
    stream.clear()
    return found


def answer(request: m.Generate, replica: int, score: float, incarnation: int = 1) -> m.GroupDone:
    trajectories = [
        Trajectory(
            request.prompt.ordinal, i, replica, [1], [2], [0.0], [VersionSpan(0, 0, 1)], "stop",
            text=f"t{i}", rewards={"exact": score}, reward=score,
        )
        for i in range(request.group_size)
    ]  # fmt: skip
    group = PromptGroup(request.prompt, trajectories)
    return m.GroupDone(replica, incarnation, "eval", request.tag, group)


def test_replicas_alone_answer_once_and_everyone_stops(tmp_path: Path) -> None:
    role = make_role(tmp_path)
    controller = RlEvaluation(role)
    controller.members.start_all()
    started = [x for x in role.bus.streams[m.inbox("supervisor")] if isinstance(x, m.StartRole)]
    assert [(start.role, start.index) for start in started] == [("rollout", 0), ("rollout", 1)]
    for replica in (0, 1):
        controller.handle(m.ReplicaReady(replica, 1, 0, {}))
    controller.advance()
    first, second = asked(role, 0), asked(role, 1)
    assert [len(first), len(second)] == [2, 2], "as many as max_in_flight"
    controller.handle(m.StepExited("rollout", 1, 1, 1, 0.0))  # lost: its prompts are handed out again
    controller.handle(answer(first[0], 0, 1.0))
    controller.handle(m.GroupFailed(0, 1, "eval", first[1].tag, first[1].prompt.ordinal, "a bad row"))
    controller.handle(m.ReplicaReady(1, 2, 0, {}))
    controller.advance()
    again = [(0, request) for request in asked(role, 0)] + [(1, request) for request in asked(role, 1)]
    assert sorted(r.prompt.ordinal for _, r in again) == sorted(r.prompt.ordinal for r in second)
    for replica, request in again:
        assert read_evaluated(role.run_dir) is None
        controller.handle(answer(request, replica, 0.0, incarnation=replica + 1))
    controller.finish_if_done()
    assert controller.ending == (0, "done")
    assert controller.stop_sent is not None
    assert controller.still_here() == [("rollout", 0)], "nobody waits for a policy"
    found = read_evaluated(role.run_dir)
    assert found is not None
    assert (found.metrics["eval/pass@1"], found.metrics["eval/failed"]) == (0.25, 1.0)
    lines = (role.run_dir.samples / "evaluation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    failed = next(row for row in rows if "failed" in row)
    assert (failed["failed"], failed["samples"]) == ("a bad row", [])
    assert rows[first[0].prompt.row]["samples"][1]["text"] == "t1"


def test_an_evaluation_that_measured_nothing_has_failed(tmp_path: Path) -> None:
    role = make_role(tmp_path)
    controller = RlEvaluation(role)
    controller.members.start_all()
    controller.handle(m.ReplicaReady(0, 1, 0, {}))
    controller.advance()
    requests = asked(role, 0)
    with pytest.raises(AttemptFailed, match="none of 4 prompts was answered and scored: no scorer"):
        while requests:
            for request in requests:
                failed = m.GroupFailed(0, 1, "eval", request.tag, request.prompt.ordinal, "no scorer")
                controller.handle(failed)
            controller.advance()
            requests = asked(role, 0)
    assert read_evaluated(role.run_dir) is None


def test_at_the_walltime_it_fails_instead_of_beginning_anew_for_ever(tmp_path: Path) -> None:
    controller = RlEvaluation(make_role(tmp_path))
    controller.interrupt("walltime")
    with pytest.raises(AttemptFailed, match=r"begins anew each time: give it more \(cluster.time\)"):
        controller.finish_if_done()


def test_sft_measures_its_loss_once_and_trains_nothing(tmp_path: Path) -> None:
    sections = {"kind": "sft", "rollout": None, "reward": [], "algorithm": {"name": "sft"}}
    role = make_role(tmp_path, **sections, eval={"only": True, "before": False})
    controller = SftEvaluation(role)
    controller.members.start_all()
    controller.handle(m.PolicyReady(0, 0, {"total_steps": "10", "eval_rows": "4"}))
    controller.advance()
    inbox = role.bus.streams[m.inbox("policy", 0)]
    assert [type(message) for message in inbox] == [m.EvalLoss]
    controller.finish_if_done()
    assert controller.stop_sent is None
    controller.handle(m.EvalDone(0, 1.5, {"eval/loss": 0.7, "eval/perplexity": 2.0}))
    controller.finish_if_done()
    assert controller.ending == (0, "done")
    found = read_evaluated(role.run_dir)
    assert found is not None
    assert found.metrics["eval/loss"] == 0.7
    without = SftEvaluation(make_role(tmp_path / "without", **sections))
    with pytest.raises(AttemptFailed, match=r"neither data.eval nor data.holdout has rows"):
        without.handle(m.PolicyReady(0, 0, {"total_steps": "10", "eval_rows": "0"}))
