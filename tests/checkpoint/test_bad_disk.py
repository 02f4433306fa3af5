"""Disks that are full, read-only or emptied while a run trains: it goes on, and the next save succeeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.run.jsonl import Appender, read

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def small_disk() -> list[str]:
    """A command prefix that gives `$1` a small filesystem of its own, as any user; skips where it cannot."""
    probe = 'mount -t tmpfs -o size=1m tmpfs "$0"'
    try:
        done = subprocess.run([*NAMESPACE, "sh", "-c", probe, "/mnt"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare(1) here")
    if done.returncode != 0:
        pytest.skip(f"no mounts in a user namespace here: {done.stderr.strip()}")
    return [*NAMESPACE, "sh", "-c", 'mount -t tmpfs -o size=96m tmpfs "$0" && exec "$@"']


def test_training_goes_on_and_the_next_save_succeeds(tmp_path: Path) -> None:
    prefix = small_disk()
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [*prefix, str(disk), sys.executable, "-m", "tests.checkpoint.bad_disk", str(disk)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "everything after step" in done.stderr  # the third failure in a row is louder


def test_entries_wait_in_memory_for_room_and_come_in_order(tmp_path: Path) -> None:
    """/dev/full takes no byte, ever."""
    path = tmp_path / "events.jsonl"
    log = Appender(path)
    log.append({"n": 1})
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    for n in (2, 3):
        log.append({"n": n})
    path.unlink()
    (tmp_path / "kept").rename(path)
    log.append({"n": 4})
    assert [entry["n"] for entry in read(path)] == [1, 2, 3, 4]
