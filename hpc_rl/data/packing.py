"""Packing by tokens: which sequences go into which forward of which rank.

Every rank gets the same number of micro-batches, because FSDP's collectives pair up forward by forward.
Within that, the micro-batches are levelled: the slowest rank of each forward sets the pace of all.
Longest-processing-time first onto the fewest micro-batches that hold everything; where that overflows
a micro-batch, best-fit decreasing (whose packing gave the count) is used as it is.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np

Bins = list[list[int]]


class PackingError(ValueError):
    """A sequence is longer than `policy.micro_batch_tokens` and the caller asked for an error."""


def pack(
    lengths: Sequence[int],
    micro_batch_tokens: int,
    ranks: int,
    overlong: Literal["own", "error"] = "own",
) -> list[list[list[int]]]:
    """Spread sequences over ranks and micro-batches: `result[rank][micro_batch] -> indices into lengths`.

    Every index appears exactly once and every rank has the same number of micro-batches; with fewer
    sequences than ranks some are empty. No micro-batch exceeds `micro_batch_tokens`, but a single
    longer sequence, which gets one of its own (`overlong="own"`) or raises PackingError.
    """
    if micro_batch_tokens < 1 or ranks < 1:
        raise ValueError(f"micro_batch_tokens {micro_batch_tokens} and ranks {ranks} must be at least 1")
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"sequence {index} has length {length}")
        if length > micro_batch_tokens and overlong == "error":
            raise PackingError(
                f"sequence {index} has {length} tokens, more than policy.micro_batch_tokens "
                f"{micro_batch_tokens}; raise it, or lower the sequence limits"
            )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    fitted = best_fit(lengths, micro_batch_tokens)
    count = max(ranks, -(-len(fitted) // ranks) * ranks)
    levelled = _level(lengths, order, micro_batch_tokens, count)
    if levelled is None:
        levelled = fitted + [[] for _ in range(count - len(fitted))]
    return _deal(lengths, levelled, ranks)


def pack_fixed(lengths: Sequence[int], micro_batch_size: int, ranks: int) -> list[list[list[int]]]:
    """As `pack`, with at most `micro_batch_size` sequences per micro-batch instead of a token budget."""
    if micro_batch_size < 1 or ranks < 1:
        raise ValueError(f"micro_batch_size {micro_batch_size} and ranks {ranks} must be at least 1")
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = -(-len(order) // (ranks * micro_batch_size))
    count = max(1, per_rank) * ranks
    # Neighbours in length share a forward, so nothing is lost to padding where a model needs it.
    size = -(-len(order) // count) if order else 0
    bins = [order[i * size : (i + 1) * size] for i in range(count)]
    return _deal(lengths, bins, ranks)


def best_fit(lengths: Sequence[int], capacity: int) -> Bins:
    """Best-fit decreasing: each sequence into the fullest bin that still holds it; a longer one alone.

    `rooms` are the different free sizes of open bins, sorted; there are at most `capacity` of them, so
    that finding the best one costs a binary search over small integers.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    bins: Bins = []
    rooms: list[int] = []
    open_bins: dict[int, Bins] = {}
    for index in order:
        length = lengths[index]
        place = bisect.bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            same = open_bins[room]
            found = same.pop()
            if not same:
                del rooms[place]
            found.append(index)
        else:
            room = capacity
            found = [index]
            bins.append(found)
        room -= length
        if room > 0:
            same = open_bins.setdefault(room, [])
            if not same:
                bisect.insort(rooms, room)
            same.append(found)
    return bins


def _level(lengths: Sequence[int], order: Sequence[int], capacity: int, count: int) -> Bins | None:
    """Longest first into the emptiest of `count` bins; None if a bin of several would overflow."""
    heap = [(0, number) for number in range(count)]
    bins: Bins = [[] for _ in range(count)]
    for index in order:
        used, number = heapq.heappop(heap)
        if bins[number] and used + lengths[index] > capacity:
            return None
        bins[number].append(index)
        heapq.heappush(heap, (used + lengths[index], number))
    return bins


def _deal(lengths: Sequence[int], bins: Bins, ranks: int) -> list[list[list[int]]]:
    """Sorted by size, `ranks` bins to each round: forwards that run together are nearly equal.

    Within a round the rank with the fewest tokens so far takes the largest bin.
    """
    sizes = {id(b): sum(lengths[i] for i in b) for b in bins}
    ordered = sorted(bins, key=lambda b: (-sizes[id(b)], b))
    result: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for start in range(0, len(ordered), ranks):
        takers = sorted(range(ranks), key=lambda r: (totals[r], r))
        for rank, members in zip(takers, ordered[start : start + ranks], strict=True):
            result[rank].append(sorted(members))
            totals[rank] += sizes[id(members)]
    return result
