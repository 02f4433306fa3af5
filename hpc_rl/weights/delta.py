"""What changed between two versions of a tensor of 16-bit elements, in few bytes, and back again.

A small optimizer step leaves most bfloat16 weights as they were and moves most others by one unit in the
last place. A patch has, one part after the other:

    wide    int16[w]    new bits of the far elements whose step does not fit into a byte
    index   uint8[]     number of unchanged elements before each far one, the largest value meaning
            or uint16[] that many unchanged elements more; or (`mask`) a bit per element
    steps   int8[f]     of the far ones: new bits minus old bits as integers; -128: the next of `wide`
    near    uint8[]     for each element that moved by one: twice the number of elements before it that did
                        not, plus one if it moved down; 254 means 127 elements more

The form of the index is the shortest of the three; where near elements are so rare that their bytes would be
mostly 254, they are far ones too. Where the tensor itself is shorter than its patch, or its elements are
not 16 bits wide, the patch is the tensor; where nothing changed, it is empty.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch

NOT_A_STEP = -128
NEAR_MOST = 127
SAME, WHOLE, GAPS8, GAPS16, MASK = "same", "whole", "gaps8", "gaps16", "mask"


class Patch(msgspec.Struct, frozen=True, array_like=True):
    """How a patch of `nbytes` is to be read: `changed` elements, of which `near` moved by one and take
    `near_nbytes`, and `wide` are not written as steps."""

    form: str
    nbytes: int
    changed: int = 0
    wide: int = 0
    near: int = 0
    near_nbytes: int = 0


def encode(old: torch.Tensor, new: torch.Tensor, element: int) -> tuple[Patch, list[np.ndarray]]:
    """The patch from `old` to `new`, uint8 [n] on the host, of elements of `element` bytes; its parts."""
    if element != 2:
        same = bool(torch.equal(old, new))
        return (Patch(SAME, 0), []) if same else (Patch(WHOLE, new.numel()), [new.numpy()])
    before, after = old.numpy().view(np.int16), new.numpy().view(np.int16)
    where = np.flatnonzero(before != after)
    if len(where) == 0:
        return Patch(SAME, 0), []
    steps = after[where] - before[where]
    one = np.abs(steps) == 1
    near = _near(where[one], steps[one] < 0)
    if near.nbytes > 3 * int(one.sum()):
        one[:], near = False, near[:0]
    far, steps = where[~one], steps[~one]
    small = steps.astype(np.int8)
    wide = (small != steps) | (small == NOT_A_STEP)
    small[wide] = NOT_A_STEP
    form, index = _index(far, len(before))
    parts = [after[far[wide]].view(np.uint8), index, small.view(np.uint8), near]
    nbytes = sum(part.nbytes for part in parts)
    if nbytes >= new.numel():
        return Patch(WHOLE, new.numel()), [new.numpy()]
    return Patch(form, nbytes, len(where), int(wide.sum()), int(one.sum()), near.nbytes), parts


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
    far, end = patch.changed - patch.near, patch.nbytes - patch.near_nbytes
    wide = content[: 2 * patch.wide].view(np.int16)
    index, small = content[2 * patch.wide : end - far], content[end - far : end].view(np.int8)
    where = _positions(patch.form, index, len(elements))
    near, down = _near_positions(content[end:])
    for found, count in ((where, far), (near, patch.near)):
        if len(found) != count or (count and found[-1] >= len(elements)):
            raise ValueError(f"a patch of {count} elements names {len(found)}, or some beyond the tensor")
    values = elements[where] + small
    values[small == NOT_A_STEP] = wide
    elements[where] = values
    elements[near] += np.where(down, -1, 1).astype(np.int16)


def _near(where: np.ndarray, down: np.ndarray) -> np.ndarray:
    gaps = np.diff(where, prepend=-1) - 1
    skips = gaps // NEAR_MOST
    written = np.full(len(where) + int(skips.sum()), NEAR_MOST << 1, dtype=np.uint8)
    written[np.arange(len(where)) + np.cumsum(skips)] = (gaps % NEAR_MOST) << 1 | down
    return written


def _near_positions(written: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gaps = (written >> 1).astype(np.int64)
    ends = gaps != NEAR_MOST
    return (np.cumsum(gaps + ends) - 1)[ends], (written & 1)[ends].astype(np.bool_)


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
