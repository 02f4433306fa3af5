"""Packing by tokens: which sequences go into which forward of which rank.

Every rank gets the same number of micro-batches, because FSDP's collectives pair up forward by forward.
Within that, the micro-batches are levelled: the slowest rank of each forward sets the pace of all. What is
levelled is work: a sequence of L tokens costs L + attention L^2, while tokens alone bound a micro-batch.
Longest-processing-time first onto the fewest micro-batches that hold everything; where that overflows a
micro-batch, best-fit decreasing (whose packing gave the count), with sequences moved and exchanged between
the dearest and the cheapest micro-batches for as long as that helps.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np

Bins = list[list[int]]
# Of the exchange between micro-batches: rounds per micro-batch, partners and sequences that are looked at.
ROUNDS, PARTNERS, CHOICE = 8, 4, 12


class PackingError(ValueError):
    """A sequence is longer than `policy.micro_batch_tokens` and the caller asked for an error."""


def pack(
    lengths: Sequence[int],
    micro_batch_tokens: int,
    ranks: int,
    overlong: Literal["own", "error"] = "own",
    attention: float = 0.0,
) -> list[list[list[int]]]:
    """Spread sequences over ranks and micro-batches: `result[rank][micro_batch] -> indices into lengths`.
    `attention` is the cost of a pair of tokens over that of a token (`catalog.flops.ModelFlops.pair_cost`).

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
    costs = [length + attention * length * length for length in lengths]
    levelled = _level(lengths, costs, order, micro_batch_tokens, count)
    if levelled is None:
        levelled = fitted + [[] for _ in range(count - len(fitted))]
        _even_out(lengths, costs, levelled, micro_batch_tokens)
    return _deal(costs, levelled, ranks)


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


def _level(
    lengths: Sequence[int], costs: Sequence[float], order: Sequence[int], capacity: int, count: int
) -> Bins | None:
    """Longest first into the cheapest of `count` bins that has room; None if there is none."""
    heap = [(0.0, number) for number in range(count)]
    bins: Bins = [[] for _ in range(count)]
    used = [0] * count
    for index in order:
        passed = []
        while heap and used[heap[0][1]] and used[heap[0][1]] + lengths[index] > capacity:
            passed.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, number = heapq.heappop(heap)
        bins[number].append(index)
        used[number] += lengths[index]
        for entry in (*passed, (cost + costs[index], number)):
            heapq.heappush(heap, entry)
    return bins


def _even_out(lengths: Sequence[int], costs: Sequence[float], bins: Bins, capacity: int) -> None:
    """Move a sequence from the dearest bin to a cheap one, or exchange two, while the dearer of both gets
    cheaper; in place, at most some rounds per bin."""
    used = [sum(lengths[i] for i in one) for one in bins]
    cost = [sum(costs[i] for i in one) for one in bins]
    for _ in range(ROUNDS * len(bins)):
        high = max(range(len(bins)), key=lambda n: (cost[n], n))
        for low in sorted(range(len(bins)), key=lambda n: (cost[n], n))[:PARTNERS]:
            found = _exchange(lengths, costs, bins, (high, low), used, cost[high] - cost[low], capacity)
            if found is not None:
                break
        else:
            return
        out, back = found
        for source, target, index in ((high, low, out), (low, high, back)):
            if index is not None:
                bins[source].remove(index)
                bins[target].append(index)
        for number in (high, low):
            used[number] = sum(lengths[i] for i in bins[number])
            cost[number] = sum(costs[i] for i in bins[number])


def _exchange(
    lengths: Sequence[int],
    costs: Sequence[float],
    bins: Bins,
    pair: tuple[int, int],
    used: Sequence[int],
    gap: float,
    capacity: int,
) -> tuple[int, int | None] | None:
    """What to take out of the dearer bin of `pair` and to put back (or None) to halve `gap` best; None if
    nothing narrows it."""
    high, low = pair
    best, found = gap, None
    for out in _ends(bins[high]):
        for back in (None, *_ends(bins[low])):
            returned = lengths[back] if back is not None else 0
            moved = costs[out] - (costs[back] if back is not None else 0.0)
            room = used[low] + lengths[out] - returned <= capacity
            room &= used[high] - lengths[out] + returned <= capacity
            if room and abs(gap - 2 * moved) < best - 1e-9 * gap:
                best, found = abs(gap - 2 * moved), (out, back)
    return found


def _ends(members: list[int]) -> list[int]:
    """Its longest and its shortest, of a bin of many: enough to choose from."""
    return members if len(members) <= 2 * CHOICE else members[:CHOICE] + members[-CHOICE:]


def _deal(costs: Sequence[float], bins: Bins, ranks: int) -> list[list[list[int]]]:
    """Sorted by size, `ranks` bins to each round: forwards that run together are nearly equal.

    Within a round the rank with the least work so far takes the largest bin.
    """
    sizes = {id(b): sum(costs[i] for i in b) for b in bins}
    ordered = sorted(bins, key=lambda b: (-sizes[id(b)], b))
    result: list[list[list[int]]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for start in range(0, len(ordered), ranks):
        takers = sorted(range(ranks), key=lambda r: (totals[r], r))
        for rank, members in zip(takers, ordered[start : start + ranks], strict=True):
            result[rank].append(sorted(members))
            totals[rank] += sizes[id(members)]
    return result
