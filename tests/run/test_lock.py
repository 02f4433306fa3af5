"""The run lock: one holder, stale ones broken, also when several break at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_rl.run.lock import LockHeld, LockLost, RunLock, live_holder, read_holder
from hpc_rl.run.paths import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, "a")


def pretend(run: RunDir, **changes: object) -> None:
    """Rewrite the lock as another holder would have written it."""
    holder = {**json.loads(run.lock.read_text()), **changes}
    run.lock.write_text(json.dumps(holder))


def test_one_holder_at_a_time(run: RunDir) -> None:
    lock = RunLock(run)
    lock.acquire()
    assert live_holder(run) is not None
    with pytest.raises(LockHeld, match=f"process {os.getpid()} on {socket.gethostname()}"):
        RunLock(run).acquire()
    lock.refresh()
    lock.release()
    assert live_holder(run) is None
    RunLock(run).acquire()
    assert [path.name for path in run.root.glob(".lock*")] == []


def test_the_lock_of_a_dead_process_is_broken(run: RunDir) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    RunLock(run).acquire()
    pretend(run, pid=dead.pid)
    assert live_holder(run) is None
    RunLock(run).acquire()
    pretend(run, ticks=1)  # the pid lives, but it is another process by now
    RunLock(run).acquire()


def test_a_holder_on_another_host_is_judged_by_slurm_or_by_its_last_touch(run: RunDir) -> None:
    RunLock(run, job_id="7").acquire()
    pretend(run, host="elsewhere")
    with pytest.raises(LockHeld, match="on elsewhere, job 7"):
        RunLock(run, job_id="8").acquire()
    with pytest.raises(LockHeld):
        RunLock(run, job_id="8").acquire(lambda job_id: True)
    RunLock(run, job_id="8").acquire(lambda job_id: job_id != "7")
    pretend(run, host="elsewhere")
    old = time.time() - 3600
    os.utime(run.lock, (old, old))
    assert live_holder(run) is None
    RunLock(run).acquire()


def test_a_requeued_job_takes_over_from_itself(run: RunDir) -> None:
    RunLock(run, job_id="7").acquire()
    pretend(run, host="elsewhere")
    RunLock(run, job_id="7", restart_count=1).acquire()


def test_a_holder_learns_that_its_lock_was_taken(run: RunDir) -> None:
    lock = RunLock(run)
    lock.acquire()
    pretend(run, ticks=1)
    RunLock(run).acquire()
    with pytest.raises(LockLost):
        lock.refresh()
    lock.release()
    assert read_holder(run.lock) is not None  # it is not ours to give back


def test_of_many_that_break_a_stale_lock_one_gets_it(run: RunDir) -> None:
    RunLock(run).acquire()
    pretend(run, ticks=1)
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from hpc_rl.run.lock import LockHeld, RunLock\n"
        "from hpc_rl.run.paths import RunDir\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: RunLock(RunDir(Path(sys.argv[1]))).acquire(); print('mine', flush=True)\n"
        "except LockHeld: print('held', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(run.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(4)
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("\n")
            racer.stdin.flush()
        answers = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    finally:
        for racer in racers:
            racer.communicate("\n", timeout=10)
    assert sorted(answers) == ["held", "held", "held", "mine"]
