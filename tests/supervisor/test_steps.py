"""Steps without a server: codes, one bad task ends the others, what is left behind, last words."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hpc_rl.run.process import start_ticks
from hpc_rl.supervisor.steps import ProcessStep, exit_words, last_words, spawn


def step(tmp_path: Path, *scripts: str) -> ProcessStep:
    log = tmp_path / "log"
    children = [spawn(["bash", "-c", script], log, os.environ, tmp_path) for script in scripts]
    return ProcessStep("policy", 0, 1, ["bash"], [log], children)


def ended(one: ProcessStep, deadline_s: float = 15.0) -> int:
    deadline = time.monotonic() + deadline_s
    while (code := one.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return code


def test_codes(tmp_path: Path) -> None:
    assert ended(step(tmp_path, "exit 0", "exit 0")) == 0
    assert ended(step(tmp_path, "exit 3")) == 3
    assert ended(step(tmp_path, "kill -9 $$")) == 137


def test_one_bad_task_ends_the_others_and_names_the_code(tmp_path: Path) -> None:
    start = time.monotonic()
    assert ended(step(tmp_path, "exec sleep 60", "exit 5", "exec sleep 60")) == 5
    assert time.monotonic() - start < 10


def test_a_task_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    start = time.monotonic()
    assert ended(step(tmp_path, "trap '' TERM; sleep 60 & wait; sleep 60", "sleep 1; exit 5")) == 5
    assert time.monotonic() - start < 14


def test_what_a_task_leaves_behind_is_killed(tmp_path: Path) -> None:
    one = step(tmp_path, "sleep 300 & echo $! > left; exit 0")
    assert ended(one) == 0
    left = int((tmp_path / "left").read_text())
    deadline = time.monotonic() + 5
    while start_ticks(left) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["", "Traceback\nModuleNotFoundError: no torch\n"], "ModuleNotFoundError: no torch"),
        (["", "12:00:00 INFO policy 0: fine\n"], ""),
        (
            ["12:00:00 ERROR policy 0: the disk is full\n12:00:01 INFO x: failed\n"],
            "12:00:00 ERROR policy 0: the disk is full",
        ),
        (["tensors, generation stalled 0.014 s\n(EngineCore pid=3) INFO 11-21 error\n"], ""),
        (
            ["Traceback (most recent call last):\n  File 'error.py'\nAttemptFailed: no\nbye\n"],
            "AttemptFailed: no",
        ),
        (["terminate called after throwing\nOSError: torn li"], "terminate called after throwing"),
        (["x" * 20000 + " error 5\n12:00:00 INFO x: fine\n"], ""),  # its start is out of sight
        (
            ["srun: error: n1: task 1: Killed\nsrun: error: n1: task 0: Exited with exit code 143\n"],
            "srun: error: n1: task 1: Killed",
        ),
    ],
)
def test_last_words(tmp_path: Path, texts: list[str], words: str) -> None:
    logs = [tmp_path / f"log{number}" for number in range(len(texts))]
    for log, text in zip(logs, texts, strict=True):
        log.write_text(text)
    assert last_words([tmp_path / "absent", *logs]) == words


def test_what_was_killed_did_not_end_by_an_error_that_it_went_on_from(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("12:00:00 ERROR x: hunter2 was refused\n12:00:01 INFO x: tensors, stalled 0.014 s\n")
    assert exit_words(137, [log], []) == "ended with signal 9 (SIGKILL)"
    words = "ended with exit code 1; its last words: 12:00:00 ERROR x: *** was refused"
    assert exit_words(1, [log], ["hunter2"]) == words
