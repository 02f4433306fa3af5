"""Which blocks of a sharded tensor a rank has, for any of DTensor's placements.

Mostly one block; where fused halves are split each (tensor parallelism over a packed projection, which is
`_StridedShard`) it is several, which `compute_local_shape_and_global_offset` does not tell. Torch's own
splitting is applied to the indices, placement by placement. A tensor that lives on some dimensions of a
larger mesh (what tensor parallelism does not split is sharded over the data-parallel ones) is a copy
along the others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


class Run(NamedTuple):
    """`size` places of one dimension: from `start` in the full tensor, from `at` in the rank's part."""

    at: int
    start: int
    size: int


class Block(NamedTuple):
    """A block of global rank `rank`: `shape` at `start` of the full tensor, at `at` of the rank's part."""

    rank: int
    at: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]

    def of_full(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.start, self.shape, strict=True))

    def of_local(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.at, self.shape, strict=True))


def own_blocks(tensor: DTensor) -> list[Block]:
    """The blocks of this rank; none if it has nothing, or is not the first holder of what it has."""
    coordinate = _whole(tensor)[0].get_coordinate()
    assert coordinate is not None, "a tensor of a mesh that this rank is not part of"
    return _at(tensor, tuple(coordinate))


def held_blocks(tensor: Tensor) -> list[Block]:
    """The blocks of this rank, whether or not others hold them too. Of a plain tensor: all of it."""
    if not isinstance(tensor, DTensor):
        return [Block(0, (0,) * tensor.dim(), (0,) * tensor.dim(), tuple(tensor.shape))]
    mesh, placements = _whole(tensor)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a tensor of a mesh that this rank is not part of"
    return _blocks(tensor, mesh, placements, tuple(coordinate))


def all_blocks(tensor: DTensor) -> list[Block]:
    """The blocks that make up `tensor`, each at its first holder. No communication."""
    mesh, _ = _whole(tensor)
    return [
        block for place in itertools.product(*(range(n) for n in mesh.shape)) for block in _at(tensor, place)
    ]


def by_rows(tensor: DTensor) -> bool:
    """Whether only the first dimension is split: each holder has whole rows."""
    return all(isinstance(p, Replicate) or _dim(p, tensor.dim()) == 0 for p in tensor.placements)


def _at(tensor: DTensor, coordinate: tuple[int, ...]) -> list[Block]:
    mesh, placements = _whole(tensor)
    if any(isinstance(p, Replicate) and at > 0 for p, at in zip(placements, coordinate, strict=True)):
        return []
    return _blocks(tensor, mesh, placements, coordinate)


def _whole(tensor: DTensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """The mesh that the tensor's mesh is cut from, and its placements there."""
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    whole = mesh._get_root_mesh()
    if whole.ndim == mesh.ndim:
        return mesh, placements
    assert mesh.mesh_dim_names is not None and whole.mesh_dim_names is not None
    by_name = dict(zip(mesh.mesh_dim_names, placements, strict=True))
    return whole, tuple(by_name.get(name, Replicate()) for name in whole.mesh_dim_names)


def _blocks(
    tensor: DTensor, mesh: DeviceMesh, placements: tuple[Placement, ...], coordinate: tuple[int, ...]
) -> list[Block]:
    rank = int(mesh.mesh[coordinate])
    per_dim = [
        _runs(size, dim, tensor.dim(), placements, tuple(mesh.shape), coordinate)
        for dim, size in enumerate(tensor.shape)
    ]
    found = []
    for runs in itertools.product(*per_dim):
        ats, starts, shape = (tuple(run[part] for run in runs) for part in range(3))
        found.append(Block(rank, ats, starts, shape))
    return found


@functools.lru_cache(maxsize=1 << 16)
def _runs(
    size: int,
    dim: int,
    ndim: int,
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> list[Run]:
    indices = torch.arange(size)
    for placement, count, at in zip(placements, mesh_shape, coordinate, strict=True):
        if _dim(placement, ndim) != dim:
            continue
        strided = isinstance(placement, _StridedShard)
        along = _StridedShard(0, split_factor=placement.split_factor) if strided else Shard(0)
        pieces, _ = along._split_tensor(indices, count, with_padding=False, contiguous=False)
        indices = pieces[at]
    return list(_bounds(indices))


def _bounds(indices: torch.Tensor) -> Iterator[Run]:
    if len(indices) == 0:
        return
    ends = (torch.nonzero(torch.diff(indices) != 1).flatten() + 1).tolist()
    for at, end in itertools.pairwise([0, *ends, len(indices)]):
        yield Run(at, int(indices[at]), end - at)


def _dim(placement: Placement, ndim: int) -> int | None:
    """The dimension that `placement` splits; None for a copy."""
    return placement.dim % ndim if isinstance(placement, Shard | _StridedShard) and ndim else None
