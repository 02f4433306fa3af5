"""Asynchronous saves with a real writer process: staging, reuse, sharding and resharding, failures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hpc_rl.checkpoint.loader import CheckpointError, load_into, tensors_of
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
