"""The run directory: layout, permissions, checkpoints, finding runs again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_rl.run.attempts import record_job
from hpc_rl.run.index import find_run, index_path, job_ids, known_runs, remember
from hpc_rl.run.paths import RunDir, RunError, check_private, write_private


def modes(run: RunDir) -> dict[str, int]:
    return {
        path.name: path.stat().st_mode & 0o777 for path in (run.root, *run.root.iterdir()) if path.is_dir()
    }


def test_a_run_is_private(tmp_path: Path) -> None:
    os.umask(0o022)
    run = RunDir.create(tmp_path, "gsm8k")
    assert set(modes(run).values()) == {0o700}
    assert run.name == "gsm8k"


def test_a_shared_run_keeps_passwords_private(tmp_path: Path) -> None:
    found = modes(RunDir.create(tmp_path, "gsm8k", run_id="r1", shared=True))
    assert found["r1"] == found["logs"] == 0o750
    assert found["bus"] == found["secrets"] == found["control"] == 0o700


def test_an_existing_run_is_not_taken(tmp_path: Path) -> None:
    RunDir.create(tmp_path, "a", run_id="1")
    with pytest.raises(RunError, match="exists already"):
        RunDir.create(tmp_path, "a", run_id="1")


@pytest.mark.skipif(os.getuid() != 0, reason="root may write everywhere; becoming another user needs root")
def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    script = (
        "from hpc_rl.run.paths import RunDir, RunError\n"
        "try: RunDir.create('/proc/1/nowhere', 'a')\n"
        "except RunError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert "cannot make the run directory" in done.stdout
    assert "output_root" in done.stdout


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "a")
    assert run.latest_complete() is None
    for step in (50, 100, 150):
        run.checkpoint(step).mkdir()
    (run.checkpoint(50) / "COMPLETE").touch()
    (run.checkpoint(100) / "COMPLETE").touch()
    (run.checkpoints / "step_00000200.partial").mkdir()
    (run.checkpoints / "step_00000200.partial" / "COMPLETE").touch()
    assert run.checkpoint(100).name == "step_00000100"
    assert run.complete_steps() == [50, 100]
    assert run.latest_complete() == 100


def test_latest_points_at_the_last_attempt(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "a")
    run.open_logs(1)
    run.open_logs(2)
    assert os.readlink(run.logs / "latest") == "attempt_2"


def test_private_files(tmp_path: Path) -> None:
    path = tmp_path / "password"
    write_private(path, b"one")
    write_private(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    check_private(path)
    path.chmod(0o640)
    with pytest.raises(RunError, match="mode 0640"):
        check_private(path)


def submitted(root: Path, name: str, run_id: str, job: str | None = None) -> RunDir:
    run = RunDir.create(root, name, run_id=run_id)
    run.resolved.write_text("name: x")
    if job is not None:
        record_job(run, job, "het")
    return run


def test_runs_are_found_by_folder_name_and_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    first = submitted(tmp_path / "elsewhere", "gsm8k", "20250101-000000-aaaa", "41")
    second = submitted(tmp_path / "elsewhere", "gsm8k", "20250102-000000-bbbb", "42")
    third = submitted(tmp_path / "runs", "other", "20250103-000000-cccc")
    remember(first)
    remember(second)
    assert find_run(first.root) == first
    assert find_run("gsm8k") == second
    assert find_run("41") == first
    assert find_run("42+1") == second
    assert find_run("other") == third  # under ./runs, though nobody noted it
    assert job_ids(second) == ["42"]
    with pytest.raises(RunError, match="known names: gsm8k, other"):
        find_run("gsm9k")
    near = submitted(tmp_path / "runs", "gsm8k", "20240101-000000-dddd")
    newest = submitted(tmp_path / "elsewhere", "gsm8k", "20250104-000000-eeee")
    remember(newest)
    assert find_run("gsm8k") == near  # what is newer elsewhere is another's: `resume` and `clean` change it
    assert find_run("gsm8k", roots=[]) == newest
    near.resolved.unlink()
    newest.resolved.unlink()
    second.resolved.unlink()
    assert known_runs() == [first]
    assert find_run("gsm8k") == first
    index_path().unlink()
    assert known_runs(["elsewhere"]) == [first]
