"""What a run writes down: ledgers that survive torn lines, attempts, causes, the prompt ledger, secrets."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hpc_rl.run import jsonl
from hpc_rl.run.attempts import close_attempt, open_attempt, read_attempts
from hpc_rl.run.events import Cause, EventLog, causes, clear_cause, first_cause, lost_cause, write_cause
from hpc_rl.run.ledger import PromptLedger, count_prompts
from hpc_rl.run.paths import RunDir, RunError
from hpc_rl.run.secrets import load_into_environ, mask, store_secrets


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path, "a")
    run.open_logs(1)
    return run


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    jsonl.append(path, {"n": 1}, {"n": 2})
    with open(path, "ab") as file:
        file.write(b'{"n": 3, "te')
    assert jsonl.read(path) == [{"n": 1}, {"n": 2}]
    jsonl.append(path, {"n": 4})
    assert jsonl.read(path) == [{"n": 1}, {"n": 2}, {"n": 4}]


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    jsonl.append(tmp_path / "m", {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert jsonl.read(tmp_path / "m") == [{"a": None, "b": [None, 1.0]}]


def test_attempts_open_and_close(run: RunDir) -> None:
    first = open_attempt(run, job_id="7", nodes=["tr1", "ro1"])
    assert first.attempt == 1
    assert read_attempts(run)[0].end is None
    close_attempt(run, first, exit_code=75, reason="requeue", cause=None)
    second = open_attempt(run, job_id="7", restart_count=1)
    assert [(a.attempt, a.reason) for a in read_attempts(run)] == [(1, "requeue"), (2, None)]
    assert read_attempts(run)[0].nodes == ["tr1", "ro1"]
    assert second.restart_count == 1


def test_an_attempt_that_nobody_closed_is_lost_with_its_cause(run: RunDir) -> None:
    open_attempt(run)
    EventLog(run, 1).failure("redis", "killed")
    open_attempt(run)
    open_attempt(run)
    first, second, _ = read_attempts(run)
    assert (first.reason, first.first_cause) == ("lost", "redis: killed")
    assert second.reason == "lost"
    assert second.first_cause is not None
    assert "without a word" in second.first_cause


def test_sigterm_of_a_job_that_runs_again_was_a_preemption(run: RunDir) -> None:
    first = open_attempt(run, job_id="7")
    close_attempt(run, first, exit_code=143, reason="cancelled", cause=None)
    second = open_attempt(run, job_id="7", restart_count=1)
    close_attempt(run, second, exit_code=143, reason="cancelled", cause=None)
    open_attempt(run, job_id="9")  # resumed by hand: the second one was a cancel
    assert [a.reason for a in read_attempts(run)] == ["preempted", "cancelled", None]


def cause(time: float, role: str, words: str, index: int = 0) -> Cause:
    return Cause(time, role, index, words, "step", 1)


def test_the_first_cause_is_the_earliest(run: RunDir) -> None:
    assert first_cause(run, 1) is None
    write_cause(run, 1, cause(200.0, "policy", "RuntimeError: no memory", 1))
    write_cause(run, 1, cause(201.0, "controller", "AttemptFailed: policy ended"))
    found = first_cause(run, 1)
    assert str(found) == "policy 1 (step): RuntimeError: no memory"
    assert len(causes(run, 1)) == 2


def test_echoes_of_a_death_are_no_cause(run: RunDir) -> None:
    write_cause(run, 1, cause(200.0, "policy", "RuntimeError: Connection closed by peer [127.0.0.1]:1", 0))
    write_cause(run, 1, cause(200.5, "policy", "MemoryError: cannot allocate", 1))
    assert first_cause(run, 1) == cause(200.5, "policy", "MemoryError: cannot allocate", 1)


def test_an_orphan_does_not_name_the_death_of_its_supervisor(run: RunDir) -> None:
    EventLog(run, 1).failure("rollout", "ended with signal 9 (SIGKILL)", index=1)  # survived, long ago
    write_cause(run, 1, cause(200.0, "rollout", "the parent process 24088 is gone"))
    write_cause(run, 1, cause(200.1, "policy", "BusLost: Redis at 127.0.0.1:1 does not answer"))
    assert str(lost_cause(run, 1)) == "supervisor: ended without a word (SIGKILL or node loss)"
    write_cause(run, 1, cause(199.0, "controller", "OSError: disk full"))
    assert str(lost_cause(run, 1)) == "controller (step): OSError: disk full"


def test_an_orphan_is_an_echo(run: RunDir) -> None:
    write_cause(run, 1, cause(200.0, "rollout", "the parent process 24088 is gone"))
    write_cause(run, 1, cause(200.5, "policy", "MemoryError: cannot allocate"))
    assert str(first_cause(run, 1)) == "policy 0 (step): MemoryError: cannot allocate"


def test_an_echo_alone_is_better_than_nothing(run: RunDir) -> None:
    write_cause(run, 1, cause(200.0, "policy", "RuntimeError: NCCL error"))
    write_cause(run, 1, cause(900.0, "controller", "AttemptFailed: x"))
    assert str(first_cause(run, 1)) == "policy 0 (step): RuntimeError: NCCL error"


def test_a_replica_that_was_survived_is_no_cause(run: RunDir) -> None:
    write_cause(run, 1, cause(100.0, "rollout", "RuntimeError: engine died", 2))
    assert first_cause(run, 1) is not None
    EventLog(run, 1).append("note", role="rollout")
    write_cause(run, 1, cause(1000.0, "policy", "OSError: disk full"))
    assert str(first_cause(run, 1)) == "policy 0 (step): OSError: disk full"


def test_a_cause_file_keeps_the_first_and_makes_room_for_the_next_incarnation(run: RunDir) -> None:
    assert write_cause(run, 1, cause(1.0, "rollout", "first"))
    assert not write_cause(run, 1, cause(2.0, "rollout", "second"))
    clear_cause(run, 1, "rollout", 0)
    assert causes(run, 1) == []
    assert write_cause(run, 1, cause(3.0, "rollout", "third"))
    clear_cause(run, 1, "rollout", 0)
    assert len(list(run.attempt_logs(1).glob("recovered_*"))) == 2


def test_the_prompt_ledger_rolls_back(run: RunDir) -> None:
    ledger = PromptLedger(run, 1)
    ledger.append(1, [0, 1], rows=[5, 6])
    ledger.append(2, [2], {3: "no valid sample"})
    ledger.append(3, [4, 5])
    assert ledger.roll_back(1) == 2
    assert ledger.roll_back(1) == 0
    PromptLedger(run, 2).append(2, [2, 3])
    trained, dropped = count_prompts(run)
    assert trained == {0: 1, 1: 1, 2: 1, 3: 1}
    assert dropped == {}
    aside = jsonl.read(run.ledger / "prompts_rolled_back.jsonl")
    assert [entry["step"] for entry in aside] == [2, 3]


def test_secrets_travel_in_one_private_file(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"HF_TOKEN": "hf_abcdef", "OTHER": "x"}
    assert store_secrets(run, ["HF_TOKEN", "WANDB_API_KEY"], environ) == ["WANDB_API_KEY"]
    assert run.secrets.stat().st_mode & 0o777 == 0o600
    assert json.loads(run.secrets.read_text()) == {"HF_TOKEN": "hf_abcdef"}
    monkeypatch.setenv("HF_TOKEN", "replaced below")
    assert load_into_environ(run, ["HF_TOKEN", "WANDB_API_KEY"]) == ["hf_abcdef"]
    assert os.environ["HF_TOKEN"] == "hf_abcdef"
    assert mask("token hf_abcdef of x", ["hf_abcdef", "x"]) == "token *** of x"
    assert store_secrets(run, ["HF_TOKEN"], {}) == []  # resumed from a shell that has it not
    run.secrets.chmod(0o644)
    with pytest.raises(RunError, match="0600"):
        load_into_environ(run, ["HF_TOKEN"])
