"""Who writes which bytes of an export: rows in place, and what must be put together by one owner.

A tensor that is in the files as it is in memory, under whatever name, and that is sharded by rows needs
no other rank: each holder writes its own rows at their place in the file. What is split, fused or
transposed on the way to the files, or sharded along another dimension, is sent to one owner (not to
everyone), which puts it together. Every rank works this out alone, from names, shapes and shardings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import (
    _compute_local_shape_and_global_offset,
    compute_local_shape_and_global_offset,
)
from torch.distributed.tensor.placement_types import _StridedShard

from hpc_rl.checkpoint.export_files import DTYPES, Entry, Plan, plan_files


class ExportError(RuntimeError):
    """The export could not be written."""


class Source(Protocol):
    """Weights to export: the live model, an average of it, or a checkpoint on disk.

    All ranks have the same units in the same order.
    """

    def units(self) -> list[dict[str, Tensor]]:
        """What the files hold, a layer at a time, by name in memory: shapes, dtypes and shardings."""
        ...

    def current(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values of a unit, sharded as it is. May compute, read or communicate; called in order."""
        ...

    def dtype_in_file(self, name: str, tensor: Tensor) -> torch.dtype: ...

    def to_file(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors (or meta ones) by name in memory, as the files have them. A tensor that is only
        renamed comes out as the same object."""
        ...


@dataclass(frozen=True)
class Block:
    """A part of a tensor and the rank that has it: `shape` at `offset`."""

    rank: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class UnitLayout:
    """`rows`: name in memory -> name in the files, written in place. `gathered`: the blocks of what goes
    to `owner`, which makes `made` of it."""

    rows: dict[str, str]
    gathered: dict[str, list[Block]]
    made: list[str]
    owner: int = 0


@dataclass
class Part:
    """Bytes that this rank writes: `tensor`, cast to `dtype`, at `start` of file number `file`."""

    file: int
    start: int
    tensor: Tensor
    dtype: torch.dtype


@dataclass
class Layout:
    """The files, who does what for them, and how much of it is this rank's: `nbytes` in `count` parts."""

    plan: Plan
    units: list[UnitLayout]
    dtypes: dict[str, torch.dtype]  # in the files, by name in memory
    nbytes: int = 0
    count: int = 0


def signature(source: Source) -> tuple[object, ...]:
    """Equal for sources with the same layout."""
    return tuple((n, tuple(t.shape), t.dtype) for unit in source.units() for n, t in unit.items())


def lay_out(source: Source, rank: int, world_size: int, file_bytes: int) -> Layout:
    """The files of `source` and what each rank does for them. No communication, no data."""
    entries: list[Entry] = []
    layout = Layout(Plan([], {}, None), [], {})
    loads = [0] * world_size
    for unit in source.units():
        dtypes = {name: source.dtype_in_file(name, tensor) for name, tensor in unit.items()}
        empty = {n: torch.empty(t.shape, dtype=dtypes[n], device="meta") for n, t in unit.items()}
        results = source.to_file(dict(empty))
        renamed = {id(tensor): name for name, tensor in results.items()}
        rows = {n: renamed[id(t)] for n, t in empty.items() if id(t) in renamed and _by_rows(unit[n])}
        in_place = set(rows.values())
        made = {name: tensor for name, tensor in results.items() if name not in in_place}
        gathered = {name: blocks(tensor) for name, tensor in unit.items() if name not in rows}
        part = UnitLayout(rows, gathered, list(made))
        if made:
            part.owner = _least_loaded(gathered, loads)
            nbytes = sum(t.numel() * t.element_size() for t in made.values())
            loads[part.owner] += nbytes
            if part.owner == rank:
                layout.nbytes, layout.count = layout.nbytes + nbytes, layout.count + len(made)
        for name in rows:
            if (own := own_rows(unit[name], rank)) is not None:
                layout.nbytes += prod(own[1]) * dtypes[name].itemsize
                layout.count += 1
        entries += [_entry(name, tensor) for name, tensor in results.items()]
        layout.units.append(part)
        layout.dtypes |= dtypes
    layout.plan = plan_files(entries, file_bytes)
    return layout


@torch.no_grad()
def parts(source: Source, layout: Layout, rank: int) -> Iterator[Part]:
    """What this rank writes, unit after unit; a part is valid until the next one is asked for.

    Ranks talk to each other only in units where something is `gathered`, each in the same order.
    """
    places = layout.plan.places
    for part, unit in zip(layout.units, source.units(), strict=True):
        values = source.current(unit)
        for name, file_name in part.rows.items():
            own = own_rows(values[name], rank)
            if own is not None:
                first, shape = own
                dtype = layout.dtypes[name]
                row_bytes = prod(shape[1:]) * dtype.itemsize
                place = places[file_name]
                yield Part(place.file, place.start + first * row_bytes, _local(values[name]), dtype)
        if part.made:
            full = _to_owner({name: values[name] for name in part.gathered}, part, layout.dtypes, rank)
            for file_name, tensor in source.to_file(full).items() if part.owner == rank else ():
                place = places[file_name]
                yield Part(place.file, place.start, tensor, tensor.dtype)


def own_rows(tensor: Tensor, rank: int) -> tuple[int, tuple[int, ...]] | None:
    """`(first row, shape)` of what this rank writes of a tensor that is whole or sharded by rows.

    None where it has no rows, or where an earlier replica has the same ones.
    """
    if not isinstance(tensor, DTensor):
        return (0, tuple(tensor.shape)) if rank == 0 and tensor.numel() else None
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    if _is_copy(tensor, coordinate):
        return None
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return (offset[0] if offset else 0, tuple(shape)) if prod(shape) else None


def blocks(tensor: Tensor) -> list[Block]:
    """The blocks that make up `tensor`, each at its first holder; [] for one that all ranks have whole."""
    if not isinstance(tensor, DTensor):
        return []
    mesh = tensor.device_mesh
    found = []
    for coordinate in product(*(range(n) for n in mesh.shape)):
        if _is_copy(tensor, coordinate):
            continue
        shape, offset = _compute_local_shape_and_global_offset(
            tensor.shape, mesh.shape, list(coordinate), tensor.placements
        )
        if prod(shape):
            found.append(Block(int(mesh.mesh[coordinate]), tuple(offset), tuple(shape)))
    return found


def _is_copy(tensor: DTensor, coordinate: Sequence[int]) -> bool:
    return any(
        isinstance(place, Replicate) and at > 0
        for place, at in zip(tensor.placements, coordinate, strict=True)
    )


def _by_rows(tensor: Tensor) -> bool:
    """Whether each holder has whole rows, one after the other."""
    if not isinstance(tensor, DTensor):
        return True
    return all(
        isinstance(place, Replicate) or (isinstance(place, Shard | _StridedShard) and place.dim == 0)
        for place in tensor.placements
    )


def _least_loaded(gathered: dict[str, list[Block]], loads: list[int]) -> int:
    """The owner of a unit: of the ranks that have a part of it, the one with the least to do."""
    holders = {block.rank for found in gathered.values() for block in found}
    return min(holders or range(len(loads)), key=lambda rank: (loads[rank], rank))


def _to_owner(
    values: dict[str, Tensor], part: UnitLayout, dtypes: dict[str, torch.dtype], rank: int
) -> dict[str, Tensor]:
    """The full tensors of a unit on its owner; {} elsewhere. Cast before they are sent."""
    full: dict[str, Tensor] = {}
    sends, arriving = [], []
    kept = []  # what is being sent must live until it is
    for name, value in values.items():
        local = _local(value).to(dtypes[name])
        if not part.gathered[name]:
            full[name] = local
            continue
        if rank == part.owner:
            full[name] = torch.empty(value.shape, dtype=local.dtype, device=local.device)
        for block in part.gathered[name]:
            if block.rank == rank == part.owner:
                _block(full[name], block).copy_(local)
            elif block.rank == rank:
                kept.append(_raw(local.contiguous()))
                sends.append(dist.P2POp(dist.isend, kept[-1], part.owner))
            elif rank == part.owner:
                buffer = torch.empty(block.shape, dtype=local.dtype, device=local.device)
                arriving.append((name, block, buffer))
                sends.append(dist.P2POp(dist.irecv, _raw(buffer), block.rank))
    if sends:
        for work in dist.batch_isend_irecv(sends):
            work.wait()
    for name, block, buffer in arriving:
        _block(full[name], block).copy_(buffer)
    return full if rank == part.owner else {}


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _block(full: Tensor, block: Block) -> Tensor:
    slices = tuple(slice(o, o + n) for o, n in zip(block.offset, block.shape, strict=True))
    return full[slices]


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: not every backend knows every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


def _entry(name: str, tensor: Tensor) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(f"{name} is {dtype}, which safetensors files cannot hold")
    return Entry(name, dtype, tuple(tensor.shape))
