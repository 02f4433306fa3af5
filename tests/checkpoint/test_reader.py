"""Reads by ranges: any sharding into any other, no more bytes and no more memory than a rank holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hpc_rl.checkpoint import reader
from hpc_rl.checkpoint.entries import PIECES
from hpc_rl.checkpoint.loader import CheckpointError, load_into
from hpc_rl.checkpoint.saver import Saver
from tests.ranks import run_ranks

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
MESHES = {"fsdp": (2,), "tp": (2,), "hsdp": (2, 2), "fsdp x tp": (2, 2)}


def whole_state() -> dict[str, torch.Tensor]:
    """Wide enough that a cut row is read by itself (`RUN`), and narrow enough that it is not."""
    torch.manual_seed(0)
    return {
        "wide": torch.randn(6, 4096),
        "narrow": torch.randn(10, 6),
        "cube": torch.randn(4, 8, 1024),
        "half": torch.randn(5, 8).bfloat16(),
        "bias": torch.randn(7),
    }


def distribute(value: torch.Tensor, kind: str, name: str) -> DTensor:
    mesh = init_device_mesh("cpu", MESHES[kind])
    column = Shard(1 if value.dim() > 1 else 0)
    placements = {
        "fsdp": [Shard(0)],
        "tp": [column],
        "hsdp": [Replicate(), Shard(0)],
        "fsdp x tp": [Shard(0), column],
    }[kind]
    return distribute_tensor(value, mesh, placements)


def save_as(rank: int, world_size: int, folder: str, kind: str) -> None:
    state = {name: distribute(value, kind, name) for name, value in whole_state().items()}
    saver = Saver(rank, world_size, "t")
    saver.stage(1, Path(folder), state)
    assert [r.error for r in saver.wait()] == ([""] if rank == 0 else [])
    saver.close()


def load_as(rank: int, world_size: int, folders: list[str], kind: str) -> None:
    for folder in folders:
        for name, value in whole_state().items():
            target = distribute(torch.zeros_like(value), kind, name)
            load_into(Path(folder), {name: target})
            assert torch.equal(target.full_tensor(), value), (folder, kind, name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    folders = {kind: root / kind.replace(" ", "") for kind in ("fsdp", "tp", "hsdp")}
    for kind, folder in folders.items():
        ranks = 4 if MESHES[kind] == (2, 2) else 2
        run_ranks(save_as, ranks, root / "logs", str(folder), kind)
    return folders


@pytest.mark.parametrize("kind", ["tp", "hsdp", "fsdp x tp"])
def test_every_sharding_is_read_into_every_other(saved: dict[str, Path], tmp_path: Path, kind: str) -> None:
    ranks = 4 if MESHES[kind] == (2, 2) else 2
    run_ranks(load_as, ranks, tmp_path, [str(folder) for folder in saved.values()], kind)


@pytest.mark.parametrize("bucket", [64, 32 << 20])
def test_one_process_reads_all_of_them(
    saved: dict[str, Path], bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "BUCKET", bucket)  # 64 bytes: one row after the other
    for folder in saved.values():
        again = {name: torch.zeros_like(value) for name, value in whole_state().items()}
        again["half"] = torch.zeros(5, 8)  # another dtype than the saved one: converted
        load_into(folder, again)
        for name, value in whole_state().items():
            assert torch.equal(again[name], value.to(again[name].dtype)), (folder, name)


def save_one(folder: Path, rows: int, columns: int) -> torch.Tensor:
    value = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    saver = Saver(0, 1, "t")
    saver.stage(1, folder, {"a": value})
    assert [r.error for r in saver.wait()] == [""]
    saver.close()
    return value


def load_shard(rank: int, world_size: int, folder: str, rows: int, columns: int, axis: int) -> None:
    """Read a shard, and compare what was read and what memory it took with the shard's size."""
    mesh = init_device_mesh("cpu", (world_size,))
    target = distribute_tensor(torch.zeros(rows, columns), mesh, [Shard(axis)])
    local = target.to_local()
    before, read = _anonymous(), _read_bytes()
    load_into(Path(folder), {"a": target})
    grown, read = _anonymous() - before, _read_bytes() - read
    assert read <= local.nbytes + (1 << 20), f"{read} bytes read for a shard of {local.nbytes}"
    assert grown <= reader.BUCKET + (8 << 20), f"{grown} bytes of memory for a shard of {local.nbytes}"
    expected = torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns)
    assert torch.equal(local, expected.chunk(world_size, dim=axis)[rank])


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon in /proc/self/status")


def _read_bytes() -> int:
    """What this process asked of read calls, from the page cache or the disk."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_rank_reads_its_own_bytes_and_needs_no_more_memory_than_a_bucket(tmp_path: Path, axis: int) -> None:
    rows, columns = 4096, 8192  # 128 MiB
    save_one(tmp_path / "c", rows, columns)
    run_ranks(load_shard, 2, tmp_path, str(tmp_path / "c"), rows, columns, axis)


def test_files_that_end_early_or_hold_something_else_are_named(tmp_path: Path) -> None:
    value = save_one(tmp_path / "c", 100, 100)
    data = tmp_path / "c" / "__0_0.distcp"
    os.truncate(data, 20_000)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp ends at byte 20000"):
        load_into(tmp_path / "c", {"a": torch.zeros_like(value)})
    data.write_bytes(bytes(50_000))
    with pytest.raises(CheckpointError, match="no tensor at byte 0, where a is"):
        load_into(tmp_path / "c", {"a": torch.zeros_like(value)})
    (tmp_path / "c" / PIECES).write_bytes(b"[[{not JSON")
    with pytest.raises(CheckpointError, match=r"\.pieces\.json cannot be read"):
        load_into(tmp_path / "c", {"a": torch.zeros_like(value)})


def real_module(rank: int, world_size: int, dp: int, tp: int) -> torch.nn.Module:
    """A block under tensor parallelism and FSDP2, whose rows are then dealt out twice."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Linear(20, 12))
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    if tp > 1:
        parallelize_module(module, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    if dp > 1:
        fully_shard(module, mesh=mesh["dp"])
    return module


def save_module(rank: int, world_size: int, folder: str, dp: int, tp: int) -> None:
    saver = Saver(rank, world_size, "t")
    saver.stage(1, Path(folder), dict(real_module(rank, world_size, dp, tp).named_parameters()))
    assert [r.error for r in saver.wait()] == ([""] if rank == 0 else [])
    saver.close()


def load_module(rank: int, world_size: int, folder: str, dp: int, tp: int) -> None:
    module = real_module(rank, world_size, dp, tp)
    expected = {n: p.full_tensor().clone() for n, p in module.named_parameters() if isinstance(p, DTensor)}
    assert expected
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    load_into(Path(folder), dict(module.named_parameters()))
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), expected[name]), name


def test_fsdp2_with_tensor_parallelism_goes_to_either_alone_and_back(tmp_path: Path) -> None:
    both, alone = str(tmp_path / "both"), str(tmp_path / "alone")
    run_ranks(save_module, 4, tmp_path, both, 2, 2)
    run_ranks(save_module, 2, tmp_path, alone, 2, 1)
    for dp, tp in ((2, 1), (1, 2)):
        run_ranks(load_module, 2, tmp_path, both, dp, tp)
    for dp, tp in ((2, 2), (1, 4)):
        run_ranks(load_module, 4, tmp_path, alone, dp, tp)
