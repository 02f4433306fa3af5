"""Checkpoints of packed projections under tensor parallelism, whose halves are split each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from hpc_rl.checkpoint.loader import load_into
from hpc_rl.checkpoint.saver import Saver
from tests.ranks import run_ranks

pytestmark = pytest.mark.torch
SHAPES = {"rows": (12, 4), "columns": (3, 8)}
DIMS = {"rows": 0, "columns": 1}


def whole() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def packed(rank: int, value: torch.Tensor, dim: int, fill: bool) -> DTensor:
    """Ranks 0 and 1 of each replica have their half of both halves."""
    mesh = init_device_mesh("cpu", (2, 2))
    half = mesh.get_coordinate()[1]  # type: ignore[index]
    pieces = value.chunk(4, dim)
    local = torch.cat([pieces[half], pieces[2 + half]], dim)
    placements: list[Any] = [Replicate(), _StridedShard(dim, split_factor=2)]
    local = local if fill else torch.zeros_like(local)
    return DTensor.from_local(local, mesh, placements, shape=value.shape, stride=value.stride())


def save(rank: int, world: int, folder: str) -> None:
    saver = Saver(rank, world, "1.1")
    saver.stage(1, Path(folder), {n: packed(rank, v, DIMS[n], True) for n, v in whole().items()})
    assert [result.error for result in saver.wait()] in ([], [""])
    saver.close()


def load(rank: int, world: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (4,))
    even = {n: distribute_tensor(torch.zeros_like(v), mesh, [Shard(0)]) for n, v in whole().items()}
    load_into(Path(folder), even)
    halves = {n: packed(rank, v, DIMS[n], False) for n, v in whole().items()}
    load_into(Path(folder), halves)
    for name, value in whole().items():
        assert torch.equal(even[name].full_tensor(), value), name
        assert torch.equal(halves[name].to_local(), packed(rank, value, DIMS[name], True).to_local()), name


def test_packed_halves_are_saved_and_loaded_in_their_places(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    run_ranks(save, 4, tmp_path, str(folder))
    run_ranks(load, 4, tmp_path, str(folder))
    alone = {name: torch.zeros_like(value) for name, value in whole().items()}
    load_into(folder, alone)
    assert all(torch.equal(alone[name], value) for name, value in whole().items())
