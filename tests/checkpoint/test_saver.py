"""Asynchronous saves with a real writer process: staging, reuse, sharding and resharding, failures."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.checkpoint.loader import CheckpointError, load_into, tensors_of
from hpc_rl.checkpoint.manifest import checksum, read_manifest, verify
from hpc_rl.checkpoint.saver import Saver
from tests.ranks import run_ranks

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def state_of(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "model.a": torch.randn(7, 5),
        "model.b": torch.randn(3, dtype=torch.bfloat16),
        "model.empty": torch.empty(0, 4),
        "step": torch.tensor(seed),
        "rng_0": torch.arange(16, dtype=torch.uint8) + seed,
    }


def test_a_save_holds_the_state_at_staging_and_buffers_are_reused(tmp_path: Path) -> None:
    saver = Saver(0, 1, "t")
    try:
        results = []
        for step in (1, 2, 3):
            state = state_of(step)
            saver.stage(step, tmp_path / str(step), state)
            buffer = saver._buffer
            for value in state.values():
                value.zero_()  # training goes on at once
        results = saver.wait()
        assert buffer is saver._buffer
    finally:
        saver.close()
    assert [(r.step, r.error) for r in results] == [(1, ""), (2, ""), (3, "")]
    for step in (1, 2, 3):
        restored = {name: torch.zeros_like(value) for name, value in state_of(step).items()}
        assert load_into(tmp_path / str(step), restored) == set(restored)
        for name, value in state_of(step).items():
            assert torch.equal(restored[name], value), (step, name)
    assert not list(tmp_path.rglob(".rank_*"))


def test_missing_and_misshaped_tensors_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        tensors_of(tmp_path)
    saver = Saver(0, 1, "t")
    saver.stage(1, tmp_path / "c", state_of(1))
    saver.wait()
    saver.close()
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: model\.c"):
        load_into(tmp_path / "c", {"model.c": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"model\.a is \[7, 5\]"):
        load_into(tmp_path / "c", {"model.a": torch.zeros(7, 6)})
    assert load_into(tmp_path / "c", {"rng_4": torch.zeros(16)}, frozenset({"rng_4"})) == set()


def test_a_failed_write_is_reported_and_the_next_save_works(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    saver = Saver(0, 1, "t")
    try:
        saver.stage(1, tmp_path / "blocked", state_of(1))
        (failed,) = saver.wait()
        assert failed.step == 1
        assert "FileExistsError" in failed.error
        saver.stage(2, tmp_path / "good", state_of(2))
        assert [r.error for r in saver.wait()] == [""]
    finally:
        saver.close()


def test_a_dead_writer_is_reported_and_replaced(tmp_path: Path) -> None:
    saver = Saver(0, 1, "t")
    try:
        saver.stage(1, tmp_path / "a", state_of(1))
        saver.wait()
        assert saver._process is not None
        saver._process.kill()
        saver._process.wait()
        saver.stage(2, tmp_path / "b", state_of(2))
        (failed,) = saver.wait()
        assert "ended with code -9" in failed.error
        saver.stage(3, tmp_path / "c", state_of(3))
        assert [r.error for r in saver.wait()] == [""]
    finally:
        saver.close()


def save(saver: Saver, step: int, folder: Path, state: dict[str, torch.Tensor]) -> str:
    """The error of one save, "" if it went well."""
    saver.stage(step, folder, state)
    (result,) = saver.wait()
    assert result.step == step
    return result.error


def test_plain_dcp_reads_what_we_write(tmp_path: Path) -> None:
    saver = Saver(0, 1, "t")
    assert save(saver, 4, tmp_path / "c", state_of(4)) == ""
    saver.close()
    restored = {name: torch.zeros_like(value) for name, value in state_of(4).items()}
    dcp.load(restored, storage_reader=dcp.FileSystemReader(tmp_path / "c"), no_dist=True)
    assert all(torch.equal(restored[name], value) for name, value in state_of(4).items())
    dcp_to_torch_save(tmp_path / "c", tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    assert all(torch.equal(one[name], value) for name, value in state_of(4).items())


def test_the_pickle_of_others_is_not_read(tmp_path: Path) -> None:
    """A checkpoint that only DCP described: its metadata are a pickle, which could run anything."""
    dcp.save(state_of(4), checkpoint_id=tmp_path / "c", no_dist=True)
    with pytest.raises(CheckpointError, match="holds no finished checkpoint"):
        load_into(tmp_path / "c", state_of(4))


def test_the_account_is_of_the_bytes_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000004"
    saver = Saver(0, 1, "t")
    assert save(saver, 4, folder / "policy", state_of(4)) == ""
    saver.close()
    write_complete(folder)
    manifest = read_manifest(folder)
    assert manifest.world_size == 1
    assert manifest.files["policy/__0_0.distcp"].xxh3 == checksum(folder / "policy" / "__0_0.distcp")
    assert manifest.files["policy/.metadata"].xxh3 == checksum(folder / "policy" / ".metadata")
    assert verify(folder, checksums=True) == ""


def test_the_layout_may_change_from_save_to_save(tmp_path: Path) -> None:
    saver = Saver(0, 1, "t")
    saver.prepare(1000)  # less than is needed
    small, large = {"a": torch.randn(3)}, {"a": torch.randn(3), "b": torch.randn(1000, 700)}
    for step, state in enumerate((small, large, small)):
        assert save(saver, step, tmp_path / str(step), state) == ""
        again = {name: torch.zeros_like(value) for name, value in state.items()}
        load_into(tmp_path / str(step), again)
        assert all(torch.equal(again[name], value) for name, value in state.items())
        assert set(tensors_of(tmp_path / str(step))) == set(state)
    saver.close()


def test_a_save_is_given_up_while_the_one_before_is_stuck_and_training_goes_on(tmp_path: Path) -> None:
    saver = Saver(0, 1, "t", wait_s=0.1)
    saver.prepare()
    assert saver._process is not None
    os.kill(saver._process.pid, signal.SIGSTOP)  # as in a filesystem that hangs
    saver.stage(1, tmp_path / "1", state_of(1))
    stall = saver.stage(2, tmp_path / "2", state_of(2))
    assert 0.1 <= stall < 5.0
    (result,) = saver.poll()
    assert (result.step, result.error) == (2, "skipped: step 1 is still being written after 0 s")
    os.kill(saver._process.pid, signal.SIGCONT)
    assert [(r.step, r.error) for r in saver.wait()] == [(1, "")]
    assert save(saver, 3, tmp_path / "3", state_of(3)) == ""
    saver.close()


def test_a_writer_that_hangs_is_ended_at_the_time_limit(tmp_path: Path) -> None:
    saver = Saver(0, 1, "t", timeout_s=0.5)
    saver.prepare()
    assert saver._process is not None
    os.kill(saver._process.pid, signal.SIGSTOP)
    error = save(saver, 1, tmp_path / "1", state_of(1))
    assert "policy ranks [0] have not written step 1" in error or "ended with code -9" in error
    assert save(saver, 2, tmp_path / "2", state_of(2)) == ""
    saver.close()


def test_a_file_that_may_not_grow_is_an_error_of_that_save(tmp_path: Path) -> None:
    """The limit on file size is a full disk that needs no mount: the same place, another errno."""
    saver = Saver(0, 1, "t")
    saver.prepare()
    assert saver._process is not None
    state = {"a": torch.randn(3 << 20)}  # 12 MiB
    soft, hard = resource.prlimit(saver._process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(saver._process.pid, resource.RLIMIT_FSIZE, (1 << 20, hard))
    assert "File too large" in save(saver, 1, tmp_path / "1", state)
    assert not list((tmp_path / "1").glob("*.distcp"))  # nothing left that fills the disk
    resource.prlimit(saver._process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    assert save(saver, 2, tmp_path / "2", state) == ""
    saver.close()


def test_a_folder_that_is_removed_while_it_is_written_is_an_error(tmp_path: Path) -> None:
    saver = Saver(0, 1, "t")
    saver.prepare()
    assert saver._process is not None
    state = {"a": torch.randn(16 << 20)}  # 64 MiB
    saver.stage(1, tmp_path / "1", state)
    while not (tmp_path / "1" / "__0_0.distcp").exists():
        time.sleep(0.001)
    shutil.rmtree(tmp_path / "1")
    (result,) = saver.wait()
    assert "No such file or directory" in result.error
    assert save(saver, 2, tmp_path / "2", state) == ""
    saver.close()


@pytest.mark.parametrize("stage", ["disk", "nothing"])
def test_staging_on_the_nodes_own_disk(tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "nothing").write_text("not a folder: nothing can be staged below it")
    local = tmp_path / stage / "run" / "rank_0.distcp"
    saver = Saver(0, 1, "t", stage=local)
    state = {**state_of(1), "large": torch.randn(5 << 20)}  # 20 MiB: several chunks
    assert save(saver, 1, tmp_path / "c", state) == ""
    saver.close()
    assert not local.exists()
    assert ("not staged" in caplog.text) == (stage == "nothing")
    again = {name: torch.zeros_like(value) for name, value in state.items()}
    load_into(tmp_path / "c", again)
    assert all(torch.equal(again[name], value) for name, value in state.items())


def sharded(value: torch.Tensor, world_size: int) -> DTensor:
    return distribute_tensor(value, init_device_mesh("cpu", (world_size,)), [Shard(0)])


def save_sharded(rank: int, world_size: int, folder: str) -> None:
    torch.manual_seed(0)
    whole = {"odd": torch.randn(5, 3), "small": torch.randn(1, 2), "even": torch.randn(8)}
    state: dict[str, torch.Tensor] = {name: sharded(value, world_size) for name, value in whole.items()}
    mesh = init_device_mesh("cpu", (world_size,))
    state["same"] = distribute_tensor(torch.arange(4.0), mesh, [Replicate()])
    state["step"] = torch.tensor(9)
    state[f"rng_{rank}"] = torch.tensor([rank, 7], dtype=torch.uint8)
    saver = Saver(rank, world_size, "t")
    saver.stage(9, Path(folder), state)
    results = saver.wait()
    assert [r.error for r in results] == ([""] if rank == 0 else [])
    saver.close()
    dist.barrier()
    again = {name: torch.zeros_like(value) for name, value in state.items()}
    load_into(Path(folder), again)
    for name, value in state.items():
        mine, theirs = (v.to_local() if isinstance(v, DTensor) else v for v in (value, again[name]))
        assert torch.equal(mine, theirs), name


def load_sharded(rank: int, world_size: int, folder: str) -> None:
    torch.manual_seed(0)
    for name, value in {"odd": torch.randn(5, 3), "small": torch.randn(1, 2), "even": torch.randn(8)}.items():
        target = sharded(torch.zeros_like(value), world_size)
        load_into(Path(folder), {name: target})
        assert torch.equal(target.full_tensor(), value), name


def test_shards_of_two_ranks_are_read_by_one_two_and_three(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    run_ranks(save_sharded, 2, tmp_path, str(folder))
    names = tensors_of(folder)
    assert {"rng_0", "rng_1", "same", "step"} <= set(names)
    torch.manual_seed(0)
    whole = {"odd": torch.zeros(5, 3), "small": torch.zeros(1, 2), "even": torch.zeros(8)}
    load_into(folder, whole)
    assert torch.equal(whole["odd"], torch.randn(5, 3))
    run_ranks(load_sharded, 3, tmp_path, str(folder))
