"""`hpc-rl clean`: what goes, what stays, and that what is in use or not ours is never touched."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hpc_rl.checkpoint.cleaning import removable, remove
from hpc_rl.checkpoint.layout import mark_bad, write_complete
from hpc_rl.checkpoint.manifest import WRITTEN, FileEntry, Written, checksum
from hpc_rl.run.attempts import close_attempt, open_attempt, record_job
from hpc_rl.run.best import Best, write_best
from hpc_rl.run.lock import RunLock
from hpc_rl.run.paths import RunDir
from tests.cli.helpers import ROOT, hpc_rl_forked

BYTES = 1000


def checkpoint(run: RunDir, step: int, complete: bool = True) -> Path:
    folder = run.checkpoint(step)
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / ".metadata").write_text("x")
    data = folder / "policy" / "__0_0.distcp"
    data.write_bytes(bytes(BYTES))
    files = {data.name: FileEntry(BYTES, checksum(data))}
    (folder / "policy" / WRITTEN).write_bytes(msgspec.json.encode(Written(1, files)))
    if complete:
        write_complete(folder)
    return folder


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(bytes(BYTES))
    return path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """An ended run with everything that a long life leaves."""
    made = RunDir.create(tmp_path / "runs", "tiny", run_id="one")
    made.resolved.write_text("name: tiny\n")
    job = record_job(made, None, "local", pid=1)
    assert job.pid == 1
    attempt = open_attempt(made)
    close_attempt(made, attempt, exit_code=0, reason="done", cause=None)
    for step in (10, 20, 30, 40):
        checkpoint(made, step)
    checkpoint(made, 25, complete=False)  # of a crash, superseded
    checkpoint(made, 50, complete=False)  # newer than the newest complete one
    write_best(made, Best(20, "eval/loss", 1.5))
    for name in ("step_00000010", "step_00000020", "step_00000030", "final"):
        folder(made.safetensors / name)
    for left in (".final.abc.partial", ".step_00000030.77.old"):
        folder(made.safetensors / left)
    folder(made.checkpoints / ".deleting-0-step_00000005")
    folder(made.checkpoints / "by-hand")
    folder(made.safetensors / "step_00000030-mine")
    folder(made.safetensors / ".hidden.partial")
    for number in (1, 2, 3):
        folder(made.attempt_logs(number))
    return made


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


GONE = [
    "checkpoints/.deleting-0-step_00000005",
    "checkpoints/step_00000010",
    "checkpoints/step_00000025",
    "checkpoints/step_00000030",
    "safetensors/.final.abc.partial",
    "safetensors/.step_00000030.77.old",
    "safetensors/step_00000010",
    "safetensors/step_00000030",
]


def paths(run: RunDir, **options: bool | int) -> list[str]:
    return sorted(str(item.path.relative_to(run.root)) for item in removable(run, **options))  # type: ignore[arg-type]


def test_best_newest_and_final_stay(run: RunDir) -> None:
    assert paths(run) == GONE
    assert paths(run, logs=True) == sorted([*GONE, "logs/attempt_1", "logs/attempt_2"])
    assert "checkpoints/step_00000030" not in paths(run, keep=2)
    assert "checkpoints/step_00000010" in paths(run, keep=2)


def test_without_a_final_export_the_newest_one_stays(run: RunDir) -> None:
    for file in (run.safetensors / "final").iterdir():
        file.unlink()
    (run.safetensors / "final").rmdir()
    assert [path for path in paths(run) if "/step" in path and path.startswith("safe")] == [
        "safetensors/step_00000010"
    ]


def test_a_newest_checkpoint_that_does_not_verify_is_not_all_that_stays(run: RunDir) -> None:
    """The newest complete one has lost bytes: the one before, to which a resume falls back, stays too."""
    (run.checkpoint(40) / "policy" / "__0_0.distcp").write_bytes(bytes(BYTES // 2))
    assert "checkpoints/step_00000030" not in paths(run)
    assert "checkpoints/step_00000040" not in paths(run)
    mark_bad(run.checkpoint(40), "a test")  # known to be bad: it does not count as the newest
    assert "checkpoints/step_00000030" not in paths(run)
    assert "checkpoints/step_00000025" in paths(run)


def test_nothing_complete_means_nothing_superseded(tmp_path: Path) -> None:
    made = RunDir.create(tmp_path / "runs", "tiny", run_id="two")
    checkpoint(made, 10, complete=False)
    folder(made.safetensors / "step_00000010")
    assert paths(made) == []


def test_links_are_left_alone(run: RunDir, tmp_path: Path) -> None:
    elsewhere = folder(tmp_path / "elsewhere")
    (run.checkpoints / "step_00000007").symlink_to(elsewhere)
    (run.safetensors / "step_00000007").symlink_to(elsewhere)
    assert paths(run) == GONE
    remove(removable(run))
    assert tree(elsewhere) == ["model.safetensors"]
    assert (run.checkpoints / "step_00000007").is_symlink()


def test_it_is_shown_first_and_done_with_yes(run: RunDir, tmp_path: Path) -> None:
    before = tree(run.root)
    sizes = {path: (run.root / path).stat().st_size for path in before}
    done = hpc_rl_forked("clean", run.root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree(run.root) == before
    assert "do it with --yes" in done.stderr
    for path in GONE:
        assert path in done.stdout
    shown = json.loads(hpc_rl_forked("clean", run.root, "--json", cwd=tmp_path).stdout)
    assert (shown["removed"], len(shown["items"])) == (False, len(GONE))
    did = json.loads(hpc_rl_forked("clean", run.root, "--yes", "--json", cwd=tmp_path).stdout)
    assert (did["removed"], did["bytes"], did["files"]) == (True, shown["bytes"], shown["files"])
    lost = sizes.keys() - set(tree(run.root))
    assert lost == {path for path in sizes if any(path.startswith(f"{gone}/") for gone in GONE)}
    assert shown["bytes"] == sum(sizes[path] for path in lost)
    assert shown["files"] == len(lost) + len(GONE) + 3  # folders too: each item's own, and `policy` of three
    assert "nothing to remove" in hpc_rl_forked("clean", run.root, cwd=tmp_path).stderr


def test_a_running_run_is_refused_and_left_as_it_is(run: RunDir, tmp_path: Path) -> None:
    lock = RunLock(run)
    lock.acquire()
    before = tree(run.root)
    for words in ([], ["--yes"]):
        done = hpc_rl_forked("clean", run.root, *words, cwd=tmp_path)
        assert (done.returncode, "is running (process" in done.stderr) == (2, True)
    assert tree(run.root) == before
    lock.release()
    assert hpc_rl_forked("clean", run.root, "--yes", cwd=tmp_path).returncode == 0


def test_of_a_run_that_waits_only_superseded_checkpoints_go(run: RunDir) -> None:
    """Its job may start at any moment: partial folders and exports are its own then."""
    assert paths(run, waiting=True) == [
        "checkpoints/.deleting-0-step_00000005", "checkpoints/step_00000010", "checkpoints/step_00000030",
    ]  # fmt: skip


def test_killed_in_the_middle_it_leaves_no_half_checkpoint_and_the_next_one_ends_it(run: RunDir) -> None:
    """SIGKILL while files are being removed: what is left is under a name that no start reads."""
    many = run.checkpoint(10) / "policy"
    for number in range(3000):
        (many / f"{number}").write_text("x")
    code = (
        "import sys; from pathlib import Path; from hpc_rl.run.paths import RunDir\n"
        "from hpc_rl.checkpoint.cleaning import removable, remove\n"
        "items = removable(RunDir(Path(sys.argv[1]))); print('go', flush=True); remove(items)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(run.root)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    while run.checkpoint(10).exists() and child.poll() is None:  # killed at once when it has begun
        pass
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    assert not run.checkpoint(10).exists()
    assert run.complete_steps() == [20, 40] or run.complete_steps() == [20, 30, 40]
    remove(removable(run))
    assert run.complete_steps() == [20, 40]
    assert not list(run.checkpoints.glob(".deleting-*"))
