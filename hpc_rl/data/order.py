"""The order of the data: every epoch is a permutation that is a pure function of (seed, epoch).

The permutation is the stable argsort of raw Philox words. NumPy keeps the words of a bit generator
fixed over its releases (it does not promise that for `permutation`), so that a run resumed next year
draws the same rows. A cursor is one integer, the ordinal: how many prompts were handed out before it
over the whole run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> Sequence[int]:
    """Row indices `[0, n)` in the order of `epoch`; the same arguments give the same order anywhere."""
    if not shuffle:
        return range(n)
    return _Permutation(_permutation(n, seed, epoch))


class _Permutation(Sequence[int]):
    """A NumPy permutation that hands out Python integers (what JSON and msgpack want)."""

    def __init__(self, order: npt.NDArray[np.int64]) -> None:
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # int or slice
        if isinstance(index, slice):
            return self._order[index].tolist()
        return int(self._order[index])


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    words = np.random.Philox(key=[seed, epoch]).random_raw(n)
    return np.argsort(words, kind="stable")


def locate(ordinal: int, n: int) -> tuple[int, int]:
    """`(epoch, position in that epoch)` of the prompt with this ordinal, for `n` rows."""
    if n < 1 or ordinal < 0:
        raise ValueError(f"ordinal {ordinal} of {n} rows")
    return divmod(ordinal, n)


def row_of(ordinal: int, n: int, seed: int, shuffle: bool = True) -> tuple[int, int]:
    """`(epoch, row index)` of the prompt with this ordinal."""
    epoch, position = locate(ordinal, n)
    return epoch, epoch_order(n, seed, epoch, shuffle)[position]


def step_ordinals(step: int, batch_size: int) -> range:
    """The ordinals that step `step` (1-based) of a run with a fixed batch trains on.

    Batches run on over the end of an epoch, so no row is left out and none is repeated within one.
    """
    if step < 1 or batch_size < 1:
        raise ValueError(f"step {step} with batch size {batch_size}")
    return range((step - 1) * batch_size, step * batch_size)


def steps_of_epochs(n: int, batch_size: int, epochs: int) -> int:
    """Steps that see every one of `n` rows `epochs` times (the last step may run into the next epoch)."""
    return -(-n * epochs // batch_size)
