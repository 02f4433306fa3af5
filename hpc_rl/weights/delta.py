"""What changed between two versions of a tensor of 16-bit elements, in few bytes, and back again.

A small optimizer step leaves most bfloat16 weights as they were and moves the others by few units in the
last place. A patch of k changed elements has, one part after the other:

    wide    int16[w]    new bits of the elements whose step does not fit into a byte
    index   uint8[]     number of unchanged elements before each changed one, the largest value meaning
            or uint16[] that many unchanged elements more; or (`mask`) a bit per element
    steps   int8[k]     new bits minus old bits as integers; -128: the next of `wide`

The form of the index is the shortest of the three. Where the tensor itself is shorter than its patch, or its
elements are not 16 bits wide, the patch is the tensor; where nothing changed, it is empty.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

NOT_A_STEP = -128
SAME, WHOLE, GAPS8, GAPS16, MASK = "same", "whole", "gaps8", "gaps16", "mask"


class Patch(msgspec.Struct, frozen=True, array_like=True):
    """How a patch of `nbytes` is to be read: `changed` elements, `wide` of them not as steps."""

    form: str
    nbytes: int
    changed: int = 0
    wide: int = 0


def encode(old: torch.Tensor, new: torch.Tensor, element: int) -> tuple[Patch, list[np.ndarray]]:
    """The patch from `old` to `new`, uint8 [n] on the host, of elements of `element` bytes; its parts."""
    if element != 2:
        same = bool(torch.equal(old, new))
        return (Patch(SAME, 0), []) if same else (Patch(WHOLE, new.numel()), [new.numpy()])
    before, after = old.numpy().view(np.int16), new.numpy().view(np.int16)
    where = np.flatnonzero(before != after)
    if len(where) == 0:
        return Patch(SAME, 0), []
    values = after[where]
    steps = values - before[where]
    small = steps.astype(np.int8)
    wide = (small != steps) | (small == NOT_A_STEP)
    small[wide] = NOT_A_STEP
    form, index = _index(where, len(before))
    parts = [values[wide].view(np.uint8), index, small.view(np.uint8)]
    nbytes = sum(part.nbytes for part in parts)
    if nbytes >= new.numel():
        return Patch(WHOLE, new.numel()), [new.numpy()]
    return Patch(form, nbytes, len(where), int(wide.sum())), parts


def apply(patch: Patch, data: torch.Tensor, old: torch.Tensor) -> None:
    """Make `old`, uint8 [n] on the host, what the patch was made for. `data` is uint8 [patch.nbytes].

    Raises ValueError for a patch that cannot be one of `old`.
    """
    if patch.form == SAME:
        return
    if patch.form == WHOLE:
        if patch.nbytes != old.numel():
            raise ValueError(f"a whole tensor of {patch.nbytes} bytes for one of {old.numel()}")
        old.copy_(data)
        return
    elements, content = old.numpy().view(np.int16), data.numpy()
    wide = content[: 2 * patch.wide].view(np.int16)
    small = content[patch.nbytes - patch.changed :].view(np.int8)
    index = content[2 * patch.wide : patch.nbytes - patch.changed]
    where = _positions(patch.form, index, len(elements))
    if len(where) != patch.changed or (len(where) and where[-1] >= len(elements)):
        raise ValueError(f"a patch of {patch.changed} elements names {len(where)}, or some beyond the tensor")
    values = elements[where] + small
    values[small == NOT_A_STEP] = wide
    elements[where] = values


def _index(where: np.ndarray, count: int) -> tuple[str, np.ndarray]:
    """The shortest way to write the ascending positions `where` among `count`."""
    gaps = np.diff(where, prepend=-1) - 1
    sizes = {
        GAPS8: len(where) + int((gaps // 0xFF).sum()),
        GAPS16: 2 * (len(where) + int((gaps // 0xFFFF).sum())),
        MASK: (count + 7) // 8,
    }
    form = min(sizes, key=lambda name: sizes[name])
    if form == MASK:
        bits = np.zeros(count, dtype=np.bool_)
        bits[where] = True
        return form, np.packbits(bits)
    kind, most = (np.uint8, 0xFF) if form == GAPS8 else (np.uint16, 0xFFFF)
    skips = gaps // most
    written = np.full(len(where) + int(skips.sum()), most, dtype=kind)
    written[np.arange(len(where)) + np.cumsum(skips)] = gaps % most
    return form, written.view(np.uint8)


def _positions(form: str, index: np.ndarray, count: int) -> np.ndarray:
    if form == MASK:
        return np.flatnonzero(np.unpackbits(index, count=count))
    if form not in (GAPS8, GAPS16):
        raise ValueError(f"a patch of unknown form {form!r}")
    kind, most = (np.uint8, 0xFF) if form == GAPS8 else (np.uint16, 0xFFFF)
    gaps = index.view(kind).astype(np.int64)
    ends = gaps != most
    return (np.cumsum(gaps + ends) - 1)[ends]
