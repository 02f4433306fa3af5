"""`hpc-rl verify`: a flipped byte, a cut and a lost file are found and named; what is whole is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hpc_rl.checkpoint.checking import check_checkpoint, check_export
from hpc_rl.checkpoint.layout import mark_bad, take
from hpc_rl.checkpoint.manifest import COMPLETE, WRITTEN
from hpc_rl.run.paths import RunDir
from tests.cli.helpers import hpc_rl_forked
from tests.cli.test_clean import BYTES, checkpoint

DATA = "policy/__0_0.distcp"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir.create(tmp_path / "runs", "tiny", run_id="one")
    made.resolved.write_text("name: tiny\n")
    for step in (10, 20):
        checkpoint(made, step)
    checkpoint(made, 30, complete=False)
    export(made.safetensors / "final")
    return made


def export(folder: Path) -> Path:
    """Two real safetensors files of one tensor each, and their index."""
    folder.mkdir(parents=True)
    for number, name in enumerate(SHARDS):
        save_file({f"w{number}": np.arange(16, dtype=np.float32)}, folder / name)
    index = {"weight_map": {f"w{number}": name for number, name in enumerate(SHARDS)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_one_line_per_checkpoint_and_exit_code_0_where_all_is_whole(run: RunDir, tmp_path: Path) -> None:
    done = hpc_rl_forked("verify", run.root, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = [line.split()[:2] for line in done.stdout.splitlines()]
    folders = ["checkpoints/step_00000010", "checkpoints/step_00000020", "safetensors/final"]
    assert words == [["ok", folder] for folder in folders]  # the partial one of step 30 does not count


def test_what_is_damaged_is_named_and_the_exit_code_is_1(run: RunDir, tmp_path: Path) -> None:
    flip(run.checkpoint(10) / DATA, BYTES // 2)
    (run.safetensors / "final" / SHARDS[1]).unlink()
    done = hpc_rl_forked("verify", run.root, cwd=tmp_path)
    assert done.returncode == 1
    first, second, third = done.stdout.splitlines()
    assert first.startswith(f"DAMAGED  checkpoints/step_00000010  {DATA} changed since it was written")
    assert second.startswith("ok       checkpoints/step_00000020")
    assert third.startswith(f"DAMAGED  safetensors/final  {SHARDS[1]} is missing")

    one = hpc_rl_forked("verify", run.root, "--step", "20", "--json", cwd=tmp_path)
    answer = json.loads(one.stdout)
    assert one.returncode == 0 and answer["ok"] and [item["step"] for item in answer["items"]] == [20]
    other = hpc_rl_forked("verify", run.root, "--step", "10", "--json", cwd=tmp_path)
    answer = json.loads(other.stdout)
    assert other.returncode == 1 and not answer["ok"] and DATA in answer["items"][0]["problems"][0]


def test_questions_that_have_no_answer(run: RunDir, tmp_path: Path) -> None:
    wrong = hpc_rl_forked("verify", run.root, "--step", "30", cwd=tmp_path)
    assert wrong.returncode == 2 and "no complete checkpoint of step 30" in wrong.stderr
    assert "complete ones: 10, 20" in wrong.stderr
    empty = RunDir.create(tmp_path / "runs", "tiny", run_id="two")
    empty.resolved.write_text("name: tiny\n")
    nothing = hpc_rl_forked("verify", empty.root, cwd=tmp_path)
    assert nothing.returncode == 2 and "neither a complete checkpoint nor a final export" in nothing.stderr
    shown = hpc_rl_forked("verify", "--help", cwd=tmp_path).stdout
    assert "hpc-rl verify gsm8k-grpo" in shown


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        (DATA, lambda path: flip(path, 0), "changed since it was written"),
        (DATA, lambda path: flip(path, BYTES - 1), "changed since it was written"),
        (DATA, cut, f"has {BYTES - 1} bytes, {BYTES} were written"),
        (DATA, Path.unlink, "is missing"),
        (f"policy/{WRITTEN}", lambda path: flip(path, 3), "changed since it was written"),
        (COMPLETE, cut, "is damaged"),
    ],
    ids=["first byte", "last byte", "cut", "missing", "list of files", "COMPLETE"],
)
def test_damage_in_a_checkpoint(run: RunDir, name: str, harm: Callable[[Path], None], said: str) -> None:
    folder = run.checkpoint(20)
    assert not check_checkpoint(folder).problems
    if name == COMPLETE:
        (folder / name).write_bytes((folder / name).read_bytes().rstrip())
    harm(folder / name)
    problems = check_checkpoint(folder).problems
    assert len(problems) == 1
    assert name in problems[0] and said in problems[0]


def test_all_damaged_files_are_named_not_only_the_first(run: RunDir) -> None:
    folder = run.checkpoint(20)
    cut(folder / DATA)
    (folder / "policy" / ".metadata").unlink()
    assert [text.split()[0] for text in check_checkpoint(folder).problems] == ["policy/.metadata", DATA]


def test_every_byte_is_told_to_the_progress(run: RunDir) -> None:
    read: list[int] = []
    found = check_checkpoint(run.checkpoint(20), read.append)
    # .metadata was in no rank's list here, and large files nobody accounted for are not hashed
    assert sum(read) == found.nbytes - (run.checkpoint(20) / "policy" / ".metadata").stat().st_size
    assert found.notes == ["1 of 3 files have no checksum: sizes only"]


def test_a_bad_mark_is_a_note_and_a_removal_by_the_run_no_damage(run: RunDir) -> None:
    mark_bad(run.checkpoint(10), "it was cut")
    found = check_checkpoint(run.checkpoint(10))
    assert not found.problems and "marked BAD by an earlier start" in found.notes[-1]
    folder = run.checkpoint(20)
    found = check_checkpoint(folder, lambda nbytes: take(folder) if folder.exists() else None)
    assert not found.problems  # open files can be read to their end
    found = check_checkpoint(folder)
    assert found.gone and not found.problems


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        (SHARDS[0], cut, "by its header"),
        (SHARDS[0], lambda path: path.write_bytes(path.read_bytes()[:20]), "cut off or overwritten"),
        (SHARDS[0], lambda path: path.write_bytes(b""), "cut off or overwritten"),
        (SHARDS[0], lambda path: flip(path, 8), "damaged header"),
        (SHARDS[0], lambda path: flip(path, 7), "cut off or overwritten"),
        (SHARDS[0], Path.unlink, "is missing"),
        (SHARDS[0], lambda path: save_file({"v": np.zeros(2, np.float32)}, path), "names w0"),
        ("config.json", cut, "cannot be read"),
        ("model.safetensors.index.json", cut, "cannot be read"),
    ],
    ids=["cut", "cut in the header", "empty", "header", "length", "missing", "another", "config", "index"],
)
def test_damage_in_an_export(tmp_path: Path, name: str, harm: Callable[[Path], None], said: str) -> None:
    folder = export(tmp_path / "final")
    assert not check_export(folder).problems
    harm(folder / name)
    problems = check_export(folder).problems
    assert len(problems) == 1 and said in problems[0]
    assert (name if said != "names w0" else "model.safetensors.index.json") in problems[0]
