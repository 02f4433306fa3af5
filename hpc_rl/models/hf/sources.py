"""Where the numbers of one tensor in memory are in the files, so that a rank reads only its own block.

Most tensors are in a file as they are in memory. Others are put together by Transformers' conversions from
several: experts one by one, fused projections, transposed ones. Conversions that only move numbers about are
followed step by step here without reading anything; what is asked for of the result is then read from where
it lies. MXFP4 is undone expert by expert. What is left is made whole, by Transformers, on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from hpc_rl.models.hf.reading import Reader

Place = tuple[int, ...]


class Source(Protocol):
    """A full tensor that can be copied from block by block."""

    @property
    def shape(self) -> Place: ...

    def fill(self, target: Tensor, offset: Place) -> None:
        """Copy the block at `offset`, as large as `target`, into it; cast and moved as `target` is."""
        ...


@dataclass(frozen=True)
class InFile:
    """A tensor as it is in a file."""

    reader: Reader
    key: str

    @property
    def shape(self) -> Place:
        return self.reader.shape(self.key)

    def fill(self, target: Tensor, offset: Place) -> None:
        self.reader.block_into(target, self.key, offset)


@dataclass(frozen=True)
class Made:
    """A tensor that was made whole."""

    tensor: Tensor

    @property
    def shape(self) -> Place:
        return tuple(self.tensor.shape)

    def fill(self, target: Tensor, offset: Place) -> None:
        block = tuple(slice(o, o + n) for o, n in zip(offset, target.shape, strict=True))
        target.copy_(self.tensor[block])


@dataclass(frozen=True)
class Joined:
    """`torch.cat` of `parts` along `dim`."""

    parts: list[Source]
    dim: int

    @property
    def shape(self) -> Place:
        total = sum(part.shape[self.dim] for part in self.parts)
        return _with(self.parts[0].shape, self.dim, total)

    def fill(self, target: Tensor, offset: Place) -> None:
        first = offset[self.dim]
        last = first + target.shape[self.dim]
        start = 0
        for part in self.parts:
            end = start + part.shape[self.dim]
            low, high = max(first, start), min(last, end)
            if low < high:
                here = target.narrow(self.dim, low - first, high - low)
                part.fill(here, _with(offset, self.dim, low - start))
            start = end


@dataclass(frozen=True)
class Raised:
    """`part.unsqueeze(dim)`."""

    part: Source
    dim: int

    @property
    def shape(self) -> Place:
        return (*self.part.shape[: self.dim], 1, *self.part.shape[self.dim :])

    def fill(self, target: Tensor, offset: Place) -> None:
        if target.shape[self.dim]:
            self.part.fill(target.select(self.dim, 0), (*offset[: self.dim], *offset[self.dim + 1 :]))


@dataclass(frozen=True)
class Cut:
    """`part.narrow(dim, start, size)`."""

    part: Source
    dim: int
    start: int
    size: int

    @property
    def shape(self) -> Place:
        return _with(self.part.shape, self.dim, self.size)

    def fill(self, target: Tensor, offset: Place) -> None:
        self.part.fill(target, _with(offset, self.dim, offset[self.dim] + self.start))


@dataclass(frozen=True)
class Turned:
    """`part.transpose(one, other)`."""

    part: Source
    one: int
    other: int

    @property
    def shape(self) -> Place:
        return self._turn(self.part.shape)

    def fill(self, target: Tensor, offset: Place) -> None:
        self.part.fill(target.transpose(self.one, self.other), self._turn(offset))

    def _turn(self, places: Place) -> Place:
        turned = list(places)
        turned[self.one], turned[self.other] = turned[self.other], turned[self.one]
        return tuple(turned)


@dataclass(frozen=True)
class FourBits:
    """Experts in MXFP4 as the numbers they stand for: `[E, R, G, B]` bytes are `[E, 2 G B, R]` numbers."""

    reader: Reader
    keys: dict[str, str]
    operation: Any
    name: str

    @property
    def shape(self) -> Place:
        (blocks,) = [key for pattern, key in self.keys.items() if pattern.endswith("_blocks")]
        experts, rows, groups, size = self.reader.shape(blocks)
        return (experts, 2 * groups * size, rows)

    def fill(self, target: Tensor, offset: Place) -> None:
        block = tuple(slice(o, o + n) for o, n in zip(offset[1:], target.shape[1:], strict=True))
        for number in range(target.shape[0]):
            at = offset[0] + number
            packed = {pattern: self.reader.rows(key, at, at + 1) for pattern, key in self.keys.items()}
            made = self.operation.convert(packed, full_layer_name=self.name)[self.name]
            target[number].copy_(made[0][block])


def convert(module: Any, reader: Reader, first: str, mapping: Any) -> dict[str, Source]:
    """What `mapping` makes, by name in memory; it holds the names of its sources, and they are used up."""
    keys = {pattern: [str(key) for key in found] for pattern, found in mapping.collected_tensors.items()}
    if [type(step) for step in mapping.operations] == [Mxfp4Dequantize]:
        return {first: FourBits(reader, {p: key for p, (key,) in keys.items()}, mapping.operations[0], first)}
    followed = _follow(module, reader, first, mapping, keys)
    if followed is None:
        mapping.collected_tensors.update({p: [reader.tensor(key) for key in ks] for p, ks in keys.items()})
        made = mapping.convert(first, model=module, config=module.config)
        return {name: Made(value[0] if isinstance(value, list) else value) for name, value in made.items()}
    # Transformers itself says what the results are called, from empty tensors.
    mapping.collected_tensors.update({p: [reader.empty(key) for key in ks] for p, ks in keys.items()})
    made = mapping.convert(first, model=module, config=module.config)
    sources = dict(zip(made, followed, strict=True))
    for name, value in made.items():
        assert sources[name].shape == tuple(value.shape), f"{name}: {sources[name].shape}, {value.shape}"
    return sources


class _Steps:
    """The state of one conversion: by pattern, several tensors, or the one they have become."""

    def __init__(self, module: Any, name: str, mapping: Any, state: dict[str, list[Source]]) -> None:
        self.module, self.name, self.state = module, name, state
        self.sources, self.targets = mapping.source_patterns, mapping.target_patterns

    def merge(self, step: MergeModulelist) -> dict[str, list[Source]]:
        merged: dict[str, list[Source]] = {}
        for pattern, parts in self.state.items():
            raised: list[Source] = [Raised(part, step.dim) for part in parts]
            merged[step.get_target_pattern(len(self.state), pattern, self.targets)] = [
                Joined(raised, step.dim)
            ]
        return merged

    def join(self, step: Concatenate) -> dict[str, list[Source]]:
        parts = [part for pattern in self.sources for part in self.state.get(pattern, [])]
        return {step.get_target_pattern(self.targets): [Joined(parts, step.dim)]}

    def cut(self, step: Chunk) -> dict[str, list[Source]]:
        ((part,),) = self.state.values()
        names = step.get_target_patterns(self.targets, config=self.module.config)
        total = part.shape[step.dim]
        size = -(-total // len(names))  # as torch.chunk does
        return {
            name: [Cut(part, step.dim, start, min(size, total - start))]
            for name, start in zip(names, range(0, total, size), strict=False)
        }

    def turn(self, step: Transpose) -> dict[str, list[Source]]:
        ((part,),) = self.state.values()
        name = step.get_target_pattern(self.state, self.sources, self.targets)
        if step.check_dims and part.shape == tuple(self.module.get_parameter(self.name).shape):
            return {name: [part]}
        return {name: [Turned(part, step.dim0, step.dim1)]}


_FOLLOWED: dict[type, Callable[[_Steps, Any], dict[str, list[Source]]]] = {
    MergeModulelist: _Steps.merge,
    Concatenate: _Steps.join,
    Chunk: _Steps.cut,
    Transpose: _Steps.turn,
}


def _follow(
    module: Any, reader: Reader, first: str, mapping: Any, keys: dict[str, list[str]]
) -> list[Source] | None:
    """What the steps make, in their order; None where a step is not one that only moves numbers, or
    the tensors do not fit together (Transformers says how)."""
    if any(type(step) not in _FOLLOWED or min(_dims(step)) < 0 for step in mapping.operations):
        return None
    for found in keys.values():
        if len({reader.shape(key) for key in found}) > 1:
            return None
    steps = _Steps(module, first, mapping, {p: [InFile(reader, key) for key in ks] for p, ks in keys.items()})
    for step in mapping.operations:
        steps.state = _FOLLOWED[type(step)](steps, step)
    return [part for parts in steps.state.values() for part in parts]


def _dims(step: Any) -> list[int]:
    return [step.dim0, step.dim1] if isinstance(step, Transpose) else [step.dim]


def _with(places: Place, dim: int, value: int) -> Place:
    return (*places[:dim], value, *places[dim + 1 :])
