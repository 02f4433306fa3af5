"""The sizes of the rows ahead, each worked out by one rank and told to the others, beside the training step.

A thread of its own goes through the rows block by block: it works out this rank's part, writes it to the
run's key-value store, and waits for what the others write. All ranks go through the same blocks in the same
order, and each writes its part before it waits: nobody waits for a rank that waits. No collective is used,
and the training step finds the sizes there. What a step trains on follows from them alone, the same on every
rank.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from hpc_rl.data.errors import DataError
from hpc_rl.data.sizes import RowSizes
from hpc_rl.data.stream import RowStream
from hpc_rl.policy.process_group import COLLECTIVE_LIMIT_S

WAIT_LIMIT_S = COLLECTIVE_LIMIT_S
POLL_FIRST_S, POLL_LONGEST_S = 0.001, 0.05
STORE_AWAY_S = 1.0  # between two tries
BLOCK = 64  # rows that are told at once, at least


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def delete_key(self, key: str) -> bool: ...


@dataclass(frozen=True)
class Share:
    """Where ranks tell each other sizes. `rank` of `ranks` is this one; every wait ends after `limit_s`."""

    store: Store
    rank: int
    ranks: int
    limit_s: float = WAIT_LIMIT_S


class SharedSizes:
    """`of(ordinal)` for the ordinals from a position on. Calls must be the same on all ranks.

    Without `share` all rows are worked out here. `name` keeps the keys of several apart.
    """

    def __init__(
        self,
        make_measure: Callable[[], Callable[[int], RowSizes]],
        share: Share | None,
        workers: int,
        name: str,
    ) -> None:
        self._share, self._name = share, name
        self._block = max(BLOCK, 4 * (share.ranks if share is not None else 1))
        self._stream: RowStream[RowSizes] = RowStream(lambda: _refusing(make_measure()), workers)
        self._thread = ThreadPoolExecutor(1, "hpc-rl-sizes")
        self._coming: list[tuple[list[int], Future[list[RowSizes]]]] = []
        self._known: dict[int, RowSizes] = {}
        self._told = 0  # exchanges so far, of this thread
        self._closed = threading.Event()
        self._next, self._end = 0, 0

    def start_at(self, cursor: int, end: int, waiting: Iterable[int] = ()) -> None:
        """Sizes are asked for `waiting`, and then from `cursor` up to `end`."""
        for _, future in self._coming:
            future.result()  # no part of it may be missed by the others
        self._coming, self._known = [], {}
        self._next, self._end = cursor, end
        if behind := sorted(set(waiting)):
            self._begin(behind)

    def expect(self, last: int) -> None:
        """Begin with the rows before ordinal `last`."""
        while self._next < min(last, self._end):
            block = list(range(self._next, min(self._next + self._block, self._end)))
            self._next += len(block)
            self._begin(block)

    def of(self, ordinal: int) -> RowSizes:
        """The sizes of one row. Raises DataError if it is refused, TimeoutError naming missing ranks."""
        self.expect(ordinal + 1)
        while ordinal not in self._known:
            block, future = self._coming.pop(0)
            self._known.update(zip(block, future.result(), strict=True))
        found = self._known[ordinal]
        if found.error:
            raise DataError(found.error)
        return found

    def forget(self, before: int) -> None:
        """Sizes of rows before that ordinal are not asked for again."""
        self._known = {ordinal: sizes for ordinal, sizes in self._known.items() if ordinal >= before}

    def close(self) -> None:
        """End the threads, also one that waits for another rank."""
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._stream.close()

    def _begin(self, block: list[int]) -> None:
        self._coming.append((block, self._thread.submit(self._sizes, block)))

    def _sizes(self, block: list[int]) -> list[RowSizes]:
        share = self._share
        rank, ranks = (share.rank, share.ranks) if share is not None else (0, 1)
        mine = block[rank::ranks]
        self._stream.want(mine)
        own = [self._stream.take(ordinal) for ordinal in mine]
        if share is None:
            return own
        self._told += 1
        keys = [f"{self._name}/{self._told}/rank {number}" for number in range(ranks)]
        parts = self._exchanged(share, keys, json.dumps([dataclasses.astuple(sizes) for sizes in own]))
        return [parts[place % ranks][place // ranks] for place in range(len(block))]

    def _exchanged(self, share: Share, keys: list[str], own: str) -> list[list[RowSizes]]:
        """What every rank has written under its key. A store that is away for a while is waited for."""
        deadline = time.monotonic() + share.limit_s
        while True:
            try:
                share.store.set(keys[share.rank], own)
                self._wait(share, keys, deadline)
                parts = [_read(share.store.get(key)) for key in keys]
                # Who has written its part of this exchange has read the one before.
                share.store.delete_key(f"{self._name}/{self._told - 1}/rank {share.rank}")
                return parts
            except dist.DistNetworkError:
                if time.monotonic() > deadline or self._closed.wait(STORE_AWAY_S):
                    raise

    def _wait(self, share: Share, keys: list[str], deadline: float) -> None:
        pause = POLL_FIRST_S
        while not share.store.check(keys):
            if time.monotonic() > deadline:
                missing = [number for number, key in enumerate(keys) if not share.store.check([key])]
                ranks = ", ".join(map(str, missing))
                raise TimeoutError(
                    f"waited {share.limit_s:g} s for policy rank {ranks} to say the sizes of its rows "
                    f"(exchange {self._told} of {self._name})"
                )
            if self._closed.wait(pause):
                raise TimeoutError(f"exchange {self._told} of {self._name} ended: the data are closed")
            pause = min(pause * 1.5, POLL_LONGEST_S)


def _read(raw: bytes) -> list[RowSizes]:
    found = []
    for sequences, *rest in json.loads(raw):
        found.append(RowSizes(tuple((int(a), int(b), int(c)) for a, b, c in sequences), *rest))
    return found


def _refusing(measure: Callable[[int], RowSizes]) -> Callable[[int], RowSizes]:
    """What is wrong with a row belongs to the step that needs it, on every rank."""

    def refused(ordinal: int) -> RowSizes:
        try:
            return measure(ordinal)
        except DataError as error:
            return RowSizes(error=str(error))

    return refused
