"""Saves that fail: training goes on, the reason is told, and the last state is never lost in silence."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.checkpoint.layout import reject
from hpc_rl.controller import saves as module
from hpc_rl.controller.members import AttemptFailed
from hpc_rl.run.events import first_cause, read_events
from hpc_rl.run.paths import RunDir
from tests.controller.sft_simulation import Policy, make_controller, write_policy_part

FULL = "OSError: [Errno 28] No space left on device"
CHECKPOINTS: dict[str, Any] = {"checkpoint": {"save_every": 2, "max_keep": 2, "export": "off"}}


class FullDisk(Policy):
    """A policy whose saves of `steps` fail, `times` times each; a part is left of every failed one."""

    def __init__(self, run: RunDir, steps: Collection[int], times: int = 1, **options: Any) -> None:
        self.left = dict.fromkeys(steps, times)
        super().__init__(make_controller(run, **CHECKPOINTS), lambda step: 0.0, eval_rows=0, **options)

    def obey(self, command: Any) -> None:
        if isinstance(command, m.SaveCheckpoint) and self.left.get(command.step, 0) > 0:
            self.left[command.step] -= 1
            self.log.append(("failed", command.step))
            (self.controller.run_dir.checkpoint(command.step) / "policy").mkdir()
            self.say(m.CheckpointSaved(command.step, 0.1, FULL))
            return
        super().obey(command)

    def done(self, what: str) -> list[int]:
        return [step for kind, step in self.log if kind == what]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_PAUSE_S", 0.0)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "simulated")


def kinds(run: RunDir, kind: str) -> list[int]:
    return [event["step"] for event in read_events(run) if event["kind"] == kind]


def test_failed_saves_cost_their_checkpoints_and_nothing_else(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    policy = FullDisk(run, (4, 6, 8))
    assert policy.run()
    assert policy.done("train") == list(range(1, 11))
    assert run.complete_steps() == [2, 10]
    assert kinds(run, "checkpoint_failed") == [4, 6, 8]
    assert [e["in_a_row"] for e in read_events(run) if e["kind"] == "checkpoint_failed"] == [1, 2, 3]
    assert kinds(run, "checkpoint_complete") == [2, 10]
    (loud,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert "everything after step 2 is lost" in loud.getMessage()
    module.layout.sweep(run.checkpoints)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000002", "step_00000010"]


def test_the_last_save_is_tried_again(run: RunDir) -> None:
    policy = FullDisk(run, (10,), times=2)
    assert policy.run()
    assert policy.done("failed") == [10, 10]
    assert policy.controller.ending == (0, "done")
    assert run.complete_steps() == [8, 10]


def test_a_last_save_that_cannot_be_made_fails_the_attempt(run: RunDir) -> None:
    policy = FullDisk(run, (10,), times=99)
    with pytest.raises(AttemptFailed, match=r"last step \(10\) could not be saved in .* No space left"):
        policy.run()
    assert run.complete_steps() == [6, 8]  # what was acknowledged stays, for the next attempt


def test_at_walltime_the_next_attempt_goes_on_from_the_one_before(run: RunDir) -> None:
    policy = FullDisk(run, range(5, 11), times=99)  # it is up to two steps ahead
    assert policy.run(lambda: policy.step == 5)
    policy.controller.interrupt("walltime")
    assert policy.run()
    assert policy.controller.ending == (75, "walltime")
    assert first_cause(run, 1) is None
    assert run.complete_steps()[-1] == 4


def test_a_stop_with_a_save_that_failed_is_no_success(run: RunDir) -> None:
    policy = FullDisk(run, range(5, 11), times=99)  # it is up to two steps ahead
    assert policy.run(lambda: policy.step == 5)
    policy.controller.interrupt("save_and_stop")
    assert policy.run()
    assert policy.controller.ending == (93, "save_and_stop")
    assert "could not be saved" in str(first_cause(run, 1))


def test_a_save_is_skipped_while_the_one_before_takes_too_long(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SKIP_AFTER_S", -1.0)
    policy = FullDisk(run, ())
    slow: list[Any] = []
    obey = policy.obey

    def answer_late(command: Any) -> None:
        """The first save is answered after step 5."""
        if isinstance(command, m.SaveCheckpoint) and not slow:
            slow.append(command)
            write_policy_part(run.checkpoint(command.step))
            return
        if isinstance(command, m.TrainStep) and command.step == 5:
            policy.say(m.CheckpointSaved(slow[0].step, 9.0))
        obey(command)

    monkeypatch.setattr(policy, "obey", answer_late)
    assert policy.run()
    # Commands are up to two steps ahead; what was skipped at the last step is made up for.
    assert kinds(run, "checkpoint_skipped") == [4, 6, 10]
    assert kinds(run, "checkpoint_complete") == [2, 8, 10]
    assert policy.done("train") == list(range(1, 11))


def test_a_damaged_checkpoint_makes_way_for_a_good_one_of_the_same_step(run: RunDir) -> None:
    for step in (2, 4):
        write_policy_part(run.checkpoint(step))
        module.layout.write_complete(run.checkpoint(step))
    reject(run.checkpoint(4), "a disk lied")
    policy = FullDisk(run, (), step=2)
    assert policy.run(lambda: policy.step == 3)
    assert run.checkpoint(4).is_dir()
    assert policy.run()
    assert policy.done("save") == [4, 6, 8, 10]
    assert kinds(run, "checkpoint_complete") == [4, 6, 8, 10]
    module.layout.sweep(run.checkpoints)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_00000008", "step_00000010"]


def test_a_sibling_run_is_never_looked_at(run: RunDir) -> None:
    """cosmos-rl 1.10: a resume took the highest step of any run below the output root."""
    sibling = RunDir.create(run.root.parent.parent, "simulated", run_id="sibling")
    write_policy_part(sibling.checkpoint(500))
    module.layout.write_complete(sibling.checkpoint(500))
    policy = FullDisk(run, ())
    assert policy.run()
    assert run.complete_steps() == [8, 10]
    assert sibling.complete_steps() == [500]
