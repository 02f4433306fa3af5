"""Which checkpoints count, and which may go."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rl.checkpoint.layout import (
    complete_checkpoints,
    latest_complete,
    partial_checkpoints,
    retain,
    step_of,
    write_complete,
)


def make(checkpoints: Path, step: int, complete: bool = True) -> Path:
    folder = checkpoints / f"step_{step:08d}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / ".metadata").write_text("x")
    (folder / "controller").mkdir()
    if complete:
        write_complete(folder)
    return folder


def steps(folders: list[Path]) -> list[int | None]:
    return [step_of(folder) for folder in folders]


def test_only_complete_folders_count(tmp_path: Path) -> None:
    assert latest_complete(tmp_path / "none") is None
    make(tmp_path, 5)
    make(tmp_path, 20)
    make(tmp_path, 100, complete=False)
    (tmp_path / "step_00000200").write_text("a file, not a folder")
    (tmp_path / "notes").mkdir()
    assert steps(complete_checkpoints(tmp_path)) == [5, 20]
    assert latest_complete(tmp_path) == tmp_path / "step_00000020"
    assert steps(partial_checkpoints(tmp_path)) == [100]


def test_an_unfinished_policy_part_is_never_declared_complete(tmp_path: Path) -> None:
    folder = make(tmp_path, 5, complete=False)
    (folder / "policy" / ".metadata").unlink()
    with pytest.raises(ValueError, match="no finished policy part"):
        write_complete(folder)
    assert latest_complete(tmp_path) is None


@pytest.mark.parametrize(
    ("max_keep", "left"), [(-1, [10, 20, 30]), (0, [30]), (1, [30]), (2, [20, 30]), (9, [10, 20, 30])]
)
def test_retention_keeps_the_newest_and_what_is_in_writing(
    tmp_path: Path, max_keep: int, left: list[int]
) -> None:
    for step in (10, 20, 30):
        make(tmp_path, step)
    make(tmp_path, 15, complete=False)  # a crash left it; step 20 has superseded it
    make(tmp_path, 40, complete=False)  # in writing
    gone = retain(tmp_path, max_keep)
    assert steps(complete_checkpoints(tmp_path)) == left
    assert steps(partial_checkpoints(tmp_path)) == [40]
    assert sorted(step_of(folder) or 0 for folder in gone) == sorted({10, 15, 20, 30} - set(left))


def test_nothing_goes_before_something_is_complete(tmp_path: Path) -> None:
    make(tmp_path, 10, complete=False)
    make(tmp_path, 20, complete=False)
    assert retain(tmp_path, 1) == []
    assert steps(partial_checkpoints(tmp_path)) == [10, 20]


def test_a_removal_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    make(tmp_path, 30)
    (tmp_path / ".deleting-step_00000010" / "policy").mkdir(parents=True)
    retain(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000030"]
