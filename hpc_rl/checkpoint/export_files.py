"""Safetensors files worked out before any byte is there: headers, offsets, the index. No torch.

The format (huggingface/safetensors, "Format"): 8 bytes with the length of the header, the header as JSON
(name -> dtype, shape, begin and end of its bytes after the header), then the bytes of the tensors without
holes. All of it follows from names, dtypes and shapes, so every rank knows where its rows go.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

# safetensors' names of torch's dtypes, and bytes per element.
DTYPES = {
    "float64": ("F64", 8), "float32": ("F32", 4), "float16": ("F16", 2), "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e5m2": ("F8_E5M2", 1), "int64": ("I64", 8), "int32": ("I32", 4),
    "int16": ("I16", 2), "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
}  # fmt: skip
_ALIGN = 8  # of the data after the header, as the reference implementation does


@dataclass(frozen=True)
class Entry:
    """A tensor of the files. `dtype` is torch's name for it (`bfloat16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes begin: in file number `file`, `start` bytes from its beginning."""

    file: int
    start: int


@dataclass(frozen=True)
class PlannedFile:
    name: str
    header: bytes
    nbytes: int  # of the whole file


@dataclass(frozen=True)
class Plan:
    files: list[PlannedFile]
    places: dict[str, Place]
    index: str | None  # model.safetensors.index.json, where there is more than one file

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)


def plan_files(entries: Sequence[Entry], file_bytes: int) -> Plan:
    """Put `entries`, in order, into files of at most `file_bytes` of tensors (one tensor at least).

    No entries, no files: what is exported then is beside them.
    """
    if not entries:
        return Plan([], {}, None)
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.nbytes > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    files: list[PlannedFile] = []
    places: dict[str, Place] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        # Wide elements first: each tensor then begins at a multiple of its element size.
        ordered = sorted(group, key=lambda entry: -DTYPES[entry.dtype][1])
        header, begins = _header(ordered)
        places |= {entry_name: Place(number, start) for entry_name, start in begins.items()}
        weight_map |= {entry.name: name for entry in group}
        files.append(PlannedFile(name, header, len(header) + sum(entry.nbytes for entry in group)))
    if len(files) == 1:
        return Plan(files, places, None)
    total = {"total_size": sum(entry.nbytes for entry in entries)}
    index = json.dumps({"metadata": total, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    return Plan(files, places, index)


def _header(entries: Sequence[Entry]) -> tuple[bytes, dict[str, int]]:
    """The length and header of a file, and where in the file each tensor begins."""
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, at = {}, 0
    for entry in entries:
        content[entry.name] = {
            "dtype": DTYPES[entry.dtype][0],
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        begins[entry.name] = at
        at += entry.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + begin for name, begin in begins.items()}
