"""The sequences of planned steps: made to know their sizes (one rank), or after the plan (several)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Protocol

from hpc_rl.data.encode import EncodedRow
from hpc_rl.data.errors import DataError
from hpc_rl.data.sizes import RowSizes, Size
from hpc_rl.data.stream import RowStream
from hpc_rl.data.token_batches import Key
from hpc_rl.policy.sft_plan import Plan, Position
from hpc_rl.policy.sft_rows import samples_of
from hpc_rl.policy.sft_sizes import SharedSizes
from hpc_rl.types import TrainSample


class Sequences(Protocol):
    """Sizes by ordinal, and the sequences themselves by key."""

    def start_at(self, at: Position, end: int | None, waiting: Iterable[int] = ()) -> None:
        """Go on from a position; rows of `waiting` are behind it. `end` is the ordinal of the run's end."""
        ...

    def expect(self, first: int, last: int) -> None:
        """Begin with the sizes of these ordinals."""
        ...

    def size(self, ordinal: int) -> RowSizes:
        """Raises DataError for a row that is refused."""
        ...

    def mine(self, plan: Plan) -> list[int]:
        """The ranks whose sequences are made here."""
        ...

    def make(self, keys: Iterable[Key], sizes: dict[Key, Size]) -> dict[Key, TrainSample]:
        """The sequences of `keys`."""
        ...

    def begin(self, keys: Iterable[Key]) -> None:
        """These will be made next."""
        ...

    def keep(self, at: Position) -> None:
        """Forget what no step after this position needs."""
        ...

    def close(self) -> None: ...


class WholeSequences:
    """Each row is encoded for its sizes, and its sequences are kept until their step."""

    def __init__(self, stream: RowStream[EncodedRow]) -> None:
        self._stream = stream
        self._made: dict[Key, TrainSample] = {}

    def start_at(self, at: Position, end: int | None, waiting: Iterable[int] = ()) -> None:
        self._made = {}

    def expect(self, first: int, last: int) -> None:
        self._stream.want(range(first, last))

    def size(self, ordinal: int) -> RowSizes:
        row = self._stream.take(ordinal)
        for sample in samples_of(ordinal, row):
            self._made[(ordinal, sample.sample)] = sample
        return RowSizes.of(row)

    def mine(self, plan: Plan) -> list[int]:
        return list(range(len(plan.dealt)))

    def make(self, keys: Iterable[Key], sizes: dict[Key, Size]) -> dict[Key, TrainSample]:
        return {key: self._made.pop(key) for key in keys}

    def begin(self, keys: Iterable[Key]) -> None:
        """They are there."""

    def keep(self, at: Position) -> None:
        self._made = {key: self._made[key] for key in at.waiting}

    def close(self) -> None:
        """The stream is its owner's."""


class OwnSequences:
    """Sizes come from `SharedSizes`; of sequences, `rank` makes its own. `where(ordinal)` names a row."""

    def __init__(
        self, stream: RowStream[EncodedRow], sizes: SharedSizes, rank: int, where: Callable[[int], str]
    ) -> None:
        self._stream, self._sizes, self._rank, self._where = stream, sizes, rank, where

    def start_at(self, at: Position, end: int | None, waiting: Iterable[int] = ()) -> None:
        self._sizes.start_at(at.cursor, sys.maxsize if end is None else end, waiting)

    def expect(self, first: int, last: int) -> None:
        self._sizes.expect(last)

    def size(self, ordinal: int) -> RowSizes:
        return self._sizes.of(ordinal)

    def mine(self, plan: Plan) -> list[int]:
        return [self._rank]

    def make(self, keys: Iterable[Key], sizes: dict[Key, Size]) -> dict[Key, TrainSample]:
        """Raises DataError where one is not as it was measured."""
        wanted, found = set(keys), {}
        for ordinal in sorted({key[0] for key in wanted}):
            for sample in samples_of(ordinal, self._stream.take(ordinal)):
                key = (ordinal, sample.sample)
                if key in wanted and sizes[key][:2] == (len(sample.token_ids), sum(sample.loss_mask)):
                    found[key] = sample
        if lost := sorted(wanted - found.keys()):
            ordinal, number = lost[0]
            raise DataError(
                f"{self._where(ordinal)}: its sequence {number} has other tokens than the "
                f"{sizes[lost[0]][0]} that the sizes of its media say; have its files changed? If not, the "
                "processor does not go by their sizes alone: use policy.batch_size"
            )
        return found

    def begin(self, keys: Iterable[Key]) -> None:
        self._stream.want(sorted({key[0] for key in keys}))

    def keep(self, at: Position) -> None:
        self._sizes.forget(at.cursor)

    def close(self) -> None:
        self._sizes.close()
