"""What the commands say of a run that waits or works: resume, logs -f; and --here of its allocation."""

from __future__ import annotations

from pathlib import Path

import pytest

import hpc_rl.cli._state as state
from hpc_rl.cli._prepare import Prepared, prepare
from hpc_rl.cli._start import check_allocation
from hpc_rl.cli._state import RunStatus
from hpc_rl.cli.errors import UserError
from hpc_rl.cli.logs import logs
from hpc_rl.cli.resume import refuse_live
from hpc_rl.run.paths import RunDir


def status(run: RunDir, word: str, reason: str = "") -> RunStatus:
    return RunStatus("tiny", str(run.root), "7", word, None, 10, 1, None, reason=reason)


def test_resume_of_a_working_run_says_cancel_first(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "tiny")
    with pytest.raises(UserError) as caught:
        refuse_live(run, status(run, "RUNNING"))
    text = str(caught.value)
    assert f"{run.root} is RUNNING (job 7)" in text
    assert text.index(f"`hpc-rl cancel {run.root}` first") < text.index("then resume")


def test_logs_of_a_waiting_run_say_once_that_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.create(tmp_path, "tiny")
    run.resolved.write_text("name: tiny\n")
    answers = ["PENDING", "PENDING", "FAILED"]
    monkeypatch.setattr("hpc_rl.cli.logs.STATE_EVERY_S", -1.0)
    monkeypatch.setattr("hpc_rl.cli.logs.POLL_S", 0.0)
    monkeypatch.setattr(state, "run_status", lambda found, live: status(found, answers.pop(0), "Resources"))
    logs(str(run.root), follow=True, role=None, attempt=None, lines=20)
    assert capsys.readouterr().err == "waiting for the job to start (Resources)\n"
    assert answers == []


@pytest.fixture
def shared(tmp_path: Path) -> Prepared:
    """One node of 8 GPUs for each role, in one allocation."""
    site = tmp_path / "site.yaml"
    site.write_text("name: s\nplacement: shared\ngpus: {style: gres, per_node: 8}\ncpus: {per_node: 64}\n")
    return prepare("gsm8k-grpo", [f"cluster.site={site}", "cluster.placement=shared"], here=True)


def test_an_ordinary_allocation_needs_the_nodes_of_all_roles(shared: Prepared) -> None:
    with pytest.raises(UserError, match="has 1 nodes, the plan needs 2"):
        check_allocation(shared, {"SLURM_JOB_NUM_NODES": "1"})
    check_allocation(shared, {"SLURM_JOB_NUM_NODES": "2"})
