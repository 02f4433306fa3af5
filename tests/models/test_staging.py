"""`model.stage`: one copy per node, by real processes; damage, changes, full disks, a holder that hangs."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpc_rl.models.base import ModelError
from hpc_rl.models.hf import staging
from hpc_rl.models.hf.folder import fingerprint
from hpc_rl.models.hf.staging import staged_folder
from hpc_rl.recipe.schema import Model
from tests.checkpoint.test_bad_disk import small_disk
from tests.models import contract as c
from tests.ranks import CONTEXT, run_ranks

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model as the Hub's cache has it, links and all, with what need not be copied."""
    blobs = c.save(tmp_path / "blobs", "llama")
    folder = tmp_path / "hub" / "the-model"
    (folder / "original").mkdir(parents=True)
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    for name in ("pytorch_model.bin", "original/model.safetensors", ".gitattributes"):
        (folder / name).write_bytes(b"not this")
    (folder / "original" / "params.json").write_text("{}")
    return folder


def spec_of(model: Path, stage: Path) -> Model:
    return Model(path=str(model), dtype="float32", stage=str(stage))


def stage_one(rank: int, size: int, model: str, stage: str, big: bool) -> None:
    logging.basicConfig(level=logging.INFO)
    staging.CHUNK_BYTES = 1 << 12 if big else 1 << 20
    print("folder", staged_folder(spec_of(Path(model), Path(stage))))


def test_processes_of_a_node_copy_once(model: Path, tmp_path: Path) -> None:
    """Four at a time; the first is killed in the middle, and another one takes over."""
    stage = tmp_path / "local" / "models"
    with (model / "big.json").open("wb") as big:
        big.truncate(200 << 20)
    victim = CONTEXT.Process(target=stage_one, args=(0, 1, str(model), str(stage), True))
    victim.start()
    deadline = time.monotonic() + 120
    while not any(f.stat().st_size for f in stage.glob(".*.partial/big.json")):
        assert time.monotonic() < deadline and victim.is_alive()
        time.sleep(0.01)
    victim.kill()
    victim.join(20)
    assert victim.exitcode == -signal.SIGKILL
    assert len(list(stage.glob(".*.partial"))) == 1

    run_ranks(stage_one, 4, tmp_path / "ranks", str(model), str(stage), False, group=False, limit_s=120)
    said = "".join(log.read_text() for log in (tmp_path / "ranks").glob("rank_*.log"))
    assert len(re.findall("copied and checked", said)) == 1
    assert len(re.findall("copied earlier", said)) == 3
    (copy,) = [path for path in stage.iterdir() if not path.name.startswith(".")]
    assert said.count(f"folder {copy}\n") == 4
    assert not list(stage.glob(".*.partial"))
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    left_out = {"pytorch_model.bin", "original/model.safetensors", ".gitattributes"}
    assert files == {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()} - left_out
    assert all((copy / name).read_bytes() == (model / name).read_bytes() for name in files)
    assert fingerprint(copy) == fingerprint(model)


def test_weights_are_read_from_the_copy(model: Path, tmp_path: Path) -> None:
    """Other numbers in it show."""
    spec = spec_of(model, tmp_path / "stage")
    copy = staged_folder(spec)
    tensors = load_file(copy / "model.safetensors")
    save_file(
        {name: value + 1 for name, value in tensors.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    built = c.build_model(model, stage=spec.stage)
    assert built.folder == model  # the copy may be gone when the run ends
    name = "model.norm.weight"
    assert torch.equal(built.module.get_parameter(name), tensors[name] + 1)


def test_what_is_missing_or_new_is_copied_again(model: Path, tmp_path: Path) -> None:
    spec = spec_of(model, tmp_path / "stage")
    copy = staged_folder(spec)
    inode = copy.stat().st_ino
    assert staged_folder(spec).stat().st_ino == inode
    (copy / "config.json").unlink()  # a cleaner of old files came by
    assert staged_folder(spec) == copy
    assert (copy / "config.json").read_bytes() == (model / "config.json").read_bytes()
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert staged_folder(spec) != copy


def test_a_damaged_disk_is_found(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is read again. The damage is done when the file has been synced."""
    sync = os.fsync

    def damaged(handle: int) -> None:
        sync(handle)
        if os.fstat(handle).st_size > 1000:  # a smaller file would grow, which is another message
            os.pwrite(handle, b"\xff\xff", 1)

    monkeypatch.setattr(os, "fsync", damaged)
    stage = tmp_path / "stage"
    with pytest.raises(ModelError, match="is not what was written there; is the disk damaged"):
        staged_folder(spec_of(model, stage))
    assert [path.suffix for path in stage.iterdir()] == [".lock"]


def test_a_holder_that_hangs_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(model, tmp_path / "stage")
    staged_folder(spec)
    (lock,) = (tmp_path / "stage").glob(".*.lock")
    monkeypatch.setattr(staging, "STALL_LIMIT_S", 0.3)
    with lock.open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ModelError, match=rf"process {os.getpid()} on .* has written nothing for 0 s"):
            staged_folder(spec)


def test_folders_that_cannot_be_are_errors(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ModelError, match=r"model\.stage: .*/file/below cannot be made on .*: Not a directory"
    ):
        staged_folder(spec_of(model, tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match=r"\$NOT_SET_HERE/x.* must be an absolute path there"):
        staged_folder(Model(path=str(model), stage="$NOT_SET_HERE/x"))
    with pytest.raises(ValueError, match="must be an absolute path of the nodes"):
        Model(path=str(model), stage="models")


FULL = """
import logging, sys
from pathlib import Path
from hpc_rl.models.hf import staging
from hpc_rl.recipe.schema import Model
def spec_of(model, stage): return Model(path=str(model), stage=str(stage))
logging.basicConfig(level=logging.INFO)
disk, model = map(Path, sys.argv[1:])
source = staging.staged_folder(spec_of(model, disk / "a"))
assert source == model, source            # 200 MB into 96: seen before
staging.MARGIN_BYTES = -(1 << 40)
assert staging.staged_folder(spec_of(model, disk / "a")) == model  # not tried again so soon
for _ in range(2):
    assert staging.staged_folder(spec_of(model, disk / "b")) == model  # seen while copying, then remembered
assert sorted(p.suffix for p in disk.rglob("*") if p.is_file()) == [".lock", ".lock"], list(disk.rglob("*"))
(model / "big.json").unlink()
assert staging.staged_folder(spec_of(model, disk / "b")).parent == disk / "b"
"""


def test_a_full_disk_is_a_warning(model: Path, tmp_path: Path) -> None:
    prefix = small_disk()
    (disk := tmp_path / "disk").mkdir()
    with (model / "big.json").open("wb") as big:
        big.truncate(200 << 20)
    command = [*prefix, str(disk), sys.executable, "-c", FULL, str(disk), str(model)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 4
    assert re.search(r"has 0\.10 GB free and the model takes 0\.21 GB; reading from .* instead", warnings[0])
    assert "was full before 0.21 GB were copied" in warnings[2]
    assert done.stderr.count(": copying") == 2
