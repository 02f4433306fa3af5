"""Who writes which bytes of an export: rows in place, and what must be put together by one owner.

A tensor that is in the files as it is in memory, under whatever name, and that is sharded by rows needs
no other rank: each holder writes its own rows at their place in the file. What is split, fused or
transposed on the way to the files, or sharded along another dimension, is sent to one owner (not to
everyone), which puts it together. Every rank works this out alone, from names, shapes and shardings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_rl.checkpoint.export_files import DTYPES, Entry, Plan, plan_files
from hpc_rl.models.blocks import Block, all_blocks, by_rows, own_blocks


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


@dataclass
class UnitLayout:
    """`rows`: name in memory -> name in the files, written in place. `gathered`: the blocks of what goes
    to `owner`, which makes `made` of it; none for a tensor that all ranks have whole."""

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


Units = list[dict[str, Tensor]]  # what `Source.units` gives; asking costs a walk over the module


def signature(units: Units) -> tuple[object, ...]:
    """Equal for sources with the same layout."""
    return tuple((n, tuple(t.shape), t.dtype) for unit in units for n, t in unit.items())


def lay_out(source: Source, units: Units, rank: int, world_size: int, file_bytes: int) -> Layout:
    """The files of `source` and what each rank does for them. No communication, no data."""
    entries: list[Entry] = []
    layout = Layout(Plan([], {}, None), [], {})
    loads = [0] * world_size
    for unit in units:
        dtypes = {name: source.dtype_in_file(name, tensor) for name, tensor in unit.items()}
        empty = {n: torch.empty(t.shape, dtype=dtypes[n], device="meta") for n, t in unit.items()}
        results = source.to_file(dict(empty))
        renamed = {id(tensor): name for name, tensor in results.items()}
        rows = {n: renamed[id(t)] for n, t in empty.items() if id(t) in renamed and _in_rows(unit[n])}
        in_place = set(rows.values())
        made = {name: tensor for name, tensor in results.items() if name not in in_place}
        gathered = {
            name: all_blocks(tensor) if isinstance(tensor, DTensor) else []
            for name, tensor in unit.items()
            if name not in rows
        }
        part = UnitLayout(rows, gathered, list(made))
        if made:
            part.owner = _least_loaded(gathered, loads)
            nbytes = sum(t.numel() * t.element_size() for t in made.values())
            loads[part.owner] += nbytes
            if part.owner == rank:
                layout.nbytes, layout.count = layout.nbytes + nbytes, layout.count + len(made)
        for name in rows:
            for block in _own(unit[name], rank):
                layout.nbytes += prod(block.shape) * dtypes[name].itemsize
                layout.count += 1
        entries += [_entry(name, tensor) for name, tensor in results.items()]
        layout.units.append(part)
        layout.dtypes |= dtypes
    layout.plan = plan_files(entries, file_bytes)
    return layout


@torch.no_grad()
def parts(source: Source, units: Units, layout: Layout, rank: int) -> Iterator[Part]:
    """What this rank writes, unit after unit; a part is valid until the next one is asked for.

    Ranks talk to each other only in units where something is `gathered`, each in the same order.
    """
    places = layout.plan.places
    for part, unit in zip(layout.units, units, strict=True):
        values = source.current(unit)
        for name, file_name in part.rows.items():
            dtype, place, local = layout.dtypes[name], places[file_name], _local(values[name])
            for block in _own(values[name], rank):
                first = block.start[0] * prod(block.shape[1:]) * dtype.itemsize if block.start else 0
                yield Part(place.file, place.start + first, local[block.of_local()], dtype)
        if part.made:
            full = _to_owner({name: values[name] for name in part.gathered}, part, layout.dtypes, rank)
            for file_name, tensor in source.to_file(full).items() if part.owner == rank else ():
                place = places[file_name]
                yield Part(place.file, place.start, tensor, tensor.dtype)


def _own(tensor: Tensor, rank: int) -> list[Block]:
    """What this rank writes of a tensor that is whole or sharded by rows."""
    if isinstance(tensor, DTensor):
        return own_blocks(tensor)
    start = (0,) * tensor.dim()
    return [Block(rank, start, start, tuple(tensor.shape))] if rank == 0 and tensor.numel() else []


def _in_rows(tensor: Tensor) -> bool:
    return not isinstance(tensor, DTensor) or by_rows(tensor)


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
                full[name][block.of_full()].copy_(local[block.of_local()])
            elif block.rank == rank:
                kept.append(_raw(local[block.of_local()].contiguous()))
                sends.append(dist.P2POp(dist.isend, kept[-1], part.owner))
            elif rank == part.owner:
                buffer = torch.empty(block.shape, dtype=local.dtype, device=local.device)
                arriving.append((name, block, buffer))
                sends.append(dist.P2POp(dist.irecv, _raw(buffer), block.rank))
    if sends:
        for work in dist.batch_isend_irecv(sends):
            work.wait()
    for name, block, buffer in arriving:
        full[name][block.of_full()].copy_(buffer)
    return full if rank == part.owner else {}


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor: not every backend knows every dtype."""
    return tensor.reshape(-1).view(torch.uint8)


def _entry(name: str, tensor: Tensor) -> Entry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(f"{name} is {dtype}, which safetensors files cannot hold")
    return Entry(name, dtype, tuple(tensor.shape))
