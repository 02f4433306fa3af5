"""Which checkpoints count, which is chosen, and which may go."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from hpc_rl.checkpoint.layout import (
    choose,
    claim,
    clear_dead,
    clear_failed,
    complete_checkpoints,
    latest_complete,
    partial_checkpoints,
    reject,
    retain,
    step_of,
    write_complete,
)
from hpc_rl.checkpoint.manifest import WRITTEN, FileEntry, Written, checksum, read_manifest, verify


def make(checkpoints: Path, step: int, complete: bool = True) -> Path:
    folder = checkpoints / f"step_{step:08d}"
    (folder / "policy").mkdir(parents=True)
    (folder / "policy" / ".metadata").write_text("x")
    (folder / "controller").mkdir()
    (folder / "controller" / "state.json").write_text(f'{{"step": {step}}}')
    data = folder / "policy" / "__0_0.distcp"
    data.write_bytes(bytes(range(100)) * step)
    files = {data.name: FileEntry(100 * step, checksum(data))}
    (folder / "policy" / WRITTEN).write_bytes(msgspec.json.encode(Written(2, files)))
    if complete:
        write_complete(folder)
    return folder


def steps(folders: list[Path]) -> list[int | None]:
    return [step_of(folder) for folder in folders]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


def test_complete_lists_every_file_with_its_size_and_checksum(tmp_path: Path) -> None:
    folder = make(tmp_path, 5)
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size) == (5, 2)
    assert set(manifest.files) == {
        "policy/.metadata", "policy/__0_0.distcp", f"policy/{WRITTEN}", "controller/state.json",
    }  # fmt: skip
    assert manifest.files["policy/__0_0.distcp"].nbytes == 500
    for name in ("policy/__0_0.distcp", "controller/state.json"):
        assert manifest.files[name].xxh3 == checksum(folder / name)
    assert verify(folder, checksums=True) == ""


def test_an_unfinished_policy_part_is_never_declared_complete(tmp_path: Path) -> None:
    folder = make(tmp_path, 5, complete=False)
    (folder / "policy" / ".metadata").unlink()
    with pytest.raises(ValueError, match="no finished policy part"):
        write_complete(folder)
    (folder / "policy" / ".metadata").write_text("x")
    data = folder / "policy" / "__0_0.distcp"
    data.write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes, 500 were written"):
        write_complete(folder)
    data.unlink()
    with pytest.raises(ValueError, match=r"__0_0\.distcp is missing"):
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


def test_the_best_stays_and_is_not_counted(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    retain(tmp_path, 2, protected={10})
    assert steps(complete_checkpoints(tmp_path)) == [10, 30, 40]


def test_nothing_goes_before_something_is_complete(tmp_path: Path) -> None:
    make(tmp_path, 10, complete=False)
    make(tmp_path, 20, complete=False)
    assert retain(tmp_path, 1) == []
    assert steps(partial_checkpoints(tmp_path)) == [10, 20]


def test_what_is_not_ours_and_another_world_size_stay(tmp_path: Path) -> None:
    """cosmos-rl 1.10: a start with more ranks than the checkpoint deleted it, and all older ones."""
    make(tmp_path, 10)  # by two ranks
    foreign = make(tmp_path, 20)
    entry = json.loads((foreign / "COMPLETE").read_text())
    (foreign / "COMPLETE").write_text(json.dumps({**entry, "world_size": 64}))
    (tmp_path / "step_30").mkdir()
    (tmp_path / "my_best_one").mkdir()
    choice = choose(tmp_path)
    assert (choice.folder, choice.bad) == (foreign, [])
    retain(tmp_path, -1)
    assert names(tmp_path) == ["my_best_one", "step_00000010", "step_00000020", "step_30"]


def test_a_removal_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    make(tmp_path, 30)
    (tmp_path / ".deleting-0-step_00000010" / "policy").mkdir(parents=True)
    retain(tmp_path, 1)
    assert names(tmp_path) == ["step_00000030"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "policy/__0_0.distcp").unlink(), "policy/__0_0.distcp is missing"),
        (lambda f: (f / "policy/__0_0.distcp").write_bytes(b"x"), "has 1 bytes, 3000 were written"),
        (lambda f: (f / "policy/.metadata").unlink(), "policy/.metadata is missing"),
        (lambda f: (f / "controller/state.json").write_text(""), "controller/state.json has 0 bytes"),
        (lambda f: (f / "COMPLETE").write_text('{"step":'), "COMPLETE is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_kept_and_never_chosen_again(
    tmp_path: Path, damage, reason: str
) -> None:
    good, bad = make(tmp_path, 20), make(tmp_path, 30)
    damage(bad)
    choice = choose(tmp_path)
    assert choice.folder == good
    ((folder, said),) = choice.bad
    assert folder == bad
    assert reason in said
    reject(bad, said)
    assert choose(tmp_path).bad == []
    assert latest_complete(tmp_path) == good
    retain(tmp_path, 1)
    assert names(tmp_path) == ["step_00000020", "step_00000030"]  # nothing has superseded it


def test_changed_bytes_are_found_by_their_checksum(tmp_path: Path) -> None:
    folder = make(tmp_path, 5)
    data = folder / "policy" / "__0_0.distcp"
    flipped = bytearray(data.read_bytes())
    flipped[77] ^= 1
    data.write_bytes(flipped)
    assert verify(folder) == ""
    assert "__0_0.distcp changed" in verify(folder, checksums=True)
    assert choose(tmp_path, checksums=True).folder is None


def test_checkpoints_without_a_list_of_files_count(tmp_path: Path) -> None:
    folder = make(tmp_path, 5)
    (folder / "COMPLETE").write_text('{"step": 5, "time": 1.0}\n')  # as before there was one
    assert choose(tmp_path).folder == folder


def test_a_save_in_the_place_of_a_damaged_one_replaces_it_when_it_is_complete(tmp_path: Path) -> None:
    make(tmp_path, 20)
    bad = make(tmp_path, 30)
    reject(bad, "a disk lied")
    claim(bad)
    assert not bad.exists()
    assert latest_complete(tmp_path) == tmp_path / "step_00000020"
    (aside,) = tmp_path.glob(".aside-*")
    retain(tmp_path, 1)
    assert aside.is_dir()  # not superseded yet
    make(tmp_path, 30)
    retain(tmp_path, 2)
    assert names(tmp_path) == ["step_00000020", "step_00000030"]


def test_failed_and_dead_saves_make_room(tmp_path: Path) -> None:
    make(tmp_path, 20)
    dead, failed = make(tmp_path, 30, complete=False), make(tmp_path, 40, complete=False)
    clear_failed(failed)
    clear_failed(tmp_path / "step_00000020")  # complete: never
    assert steps(partial_checkpoints(tmp_path)) == [30]
    assert clear_dead(tmp_path, writing={30}) == []
    assert clear_dead(tmp_path, writing=()) == [dead]
    assert steps(complete_checkpoints(tmp_path)) == [20]
