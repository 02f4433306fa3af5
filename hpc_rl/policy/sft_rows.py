"""Where SFT's sequences come from: the recipe's rows, and how each thread encodes them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hpc_rl.data.encode import IMAGE, VIDEO, EncodedRow, Encoder
from hpc_rl.data.media import MediaFiles
from hpc_rl.data.multimodal import Multimodal
from hpc_rl.data.packing import pack, pack_fixed
from hpc_rl.data.preference_encode import PairEncoder
from hpc_rl.data.rows import Rows
from hpc_rl.data.sizes import Measured, RowSizes
from hpc_rl.data.stream import RowStream
from hpc_rl.recipe.schema import DatasetSpec, Policy
from hpc_rl.types import TrainSample

# (number of micro-batches, sums) of this rank -> (the largest number, the sums) over data-parallel ranks
Agree = Callable[[int, list[float]], tuple[int, list[float]]]


@dataclass(frozen=True)
class RowSource:
    """`encoder()` makes a function from row index to sequences, for one thread alone.

    `has_media`: rows go through a processor, so a rank encodes its own only. `without_media` is then an
    encoder to the same tokens that reads no more of media than their sizes.
    """

    rows: Rows
    spec: DatasetSpec
    encoder: Callable[[], Callable[[int], EncodedRow]]
    has_media: bool = False
    without_media: Callable[[], Callable[[int], EncodedRow]] | None = None

    @property
    def pairs(self) -> bool:
        """Whether a row is a preference pair, of which the loss counts pairs and not tokens."""
        return self.spec.format == "preference"

    def measure(self) -> Callable[[int], RowSizes]:
        """A function from row index to the sizes of its sequences, for one thread alone."""
        encode = (self.without_media or self.encoder)()
        return lambda index: RowSizes.of(encode(index))


def row_source(
    rows: Rows,
    spec: DatasetSpec,
    tokenizer: Any,
    max_length: int | None,
    *,
    processor: Any = None,
    files: MediaFiles | None = None,
    today: datetime | None = None,
) -> RowSource:
    """Rows through a tokenizer, or with images through a processor (which has its tokenizer)."""
    lock = threading.Lock()

    def encoder(kind: type[Multimodal] = Multimodal) -> Callable[[int], EncodedRow]:
        with lock:  # fast tokenizers must not be used by two threads, not even to be copied
            own = copy.deepcopy(tokenizer if processor is None else processor)
        media = None
        if processor is not None:
            assert files is not None
            media, own = kind(own, files, today), own.tokenizer
        encode: Encoder | PairEncoder = Encoder(own, spec, max_length, media, today)
        if spec.format == "preference":
            encode = PairEncoder(encode, spec, max_length)
        return lambda index: encode(rows[index], rows.where(index))

    encoder()  # a missing chat template is an error of the start, not of a thread
    if processor is None:
        return RowSource(rows, spec, encoder)
    return RowSource(rows, spec, encoder, True, lambda: encoder(Measured))


def samples_of(ordinal: int, row: EncodedRow) -> list[TrainSample]:
    """The train samples of an encoded row."""
    return [
        TrainSample(ordinal, number, one.token_ids, one.loss_mask, [], [], media=one.media, split=one.split)
        for number, one in enumerate(row.sequences)
    ]


def deal(policy: Policy, samples: list[TrainSample], ranks: int) -> list[list[list[TrainSample]]]:
    """`samples` by rank and micro-batch."""
    plan = deal_lengths(policy, [len(sample.token_ids) for sample in samples], ranks)
    return [[[samples[i] for i in indices] for indices in rank] for rank in plan]


def deal_lengths(policy: Policy, lengths: list[int], ranks: int) -> list[list[list[int]]]:
    """Indices into `lengths` by rank and micro-batch."""
    if policy.micro_batch_size is not None:
        return pack_fixed(lengths, policy.micro_batch_size, ranks)
    return pack(lengths, policy.micro_batch_tokens or max(lengths, default=1), ranks)


def agreed(
    agree: Agree | None, count: int, sums: list[float], rows: list[EncodedRow]
) -> tuple[int, list[float], int]:
    """`(the largest count, the sums, all kinds of media in the rows)` over data-parallel ranks."""
    kinds = [kind for kind in (IMAGE, VIDEO) if any(row.kinds & kind for row in rows)]
    flags = [float(kind in kinds) for kind in (IMAGE, VIDEO)]
    if agree is not None:
        count, totals = agree(count, [*sums, *flags])
        sums, flags = totals[:-2], totals[-2:]
    return count, sums, IMAGE * (flags[0] > 0) + VIDEO * (flags[1] > 0)


class EvalRows:
    """Validation rows in file order, block by block, so that they need not be in memory at once."""

    def __init__(self, source: RowSource, policy: Policy, workers: int) -> None:
        self._source, self._policy = source, policy
        self._block = max(64, policy.batch_size)
        self._stream: RowStream[EncodedRow] = RowStream(source.encoder, workers)

    def __len__(self) -> int:
        return len(self._source.rows)

    def micro_batches(
        self, rank: int, ranks: int, agree: Agree | None
    ) -> Iterator[tuple[list[TrainSample], int]]:
        """Those of data-parallel rank `rank`, and the kinds of media that some rank has beside each; every
        rank gets equally many."""
        blocks = [self._mine(first, rank, ranks) for first in range(0, len(self), self._block)]
        for number, ordinals in enumerate(blocks):
            self._stream.want(ordinals)
            if number + 1 < len(blocks):
                self._stream.want(blocks[number + 1])
            rows = [(ordinal, self._stream.take(ordinal)) for ordinal in ordinals]
            samples = [sample for ordinal, row in rows for sample in samples_of(ordinal, row)]
            if not self._source.has_media:
                yield from ((mine, 0) for mine in deal(self._policy, samples, ranks)[rank])
                continue
            mine = deal(self._policy, samples, 1)[0]
            count, _, kinds = agreed(agree, len(mine), [], [row for _, row in rows])
            yield from ((one, kinds) for one in mine)
            yield from (([], kinds) for _ in range(count - len(mine)))

    def close(self) -> None:
        self._stream.close()

    def _mine(self, first: int, rank: int, ranks: int) -> list[int]:
        last = min(first + self._block, len(self))
        return list(range(first + rank, last, ranks) if self._source.has_media else range(first, last))
