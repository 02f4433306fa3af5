"""What a step trains on, from the position and the sizes of rows alone; no sequence is needed for it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hpc_rl.data.sizes import RowSizes, Size
from hpc_rl.data.token_batches import Key, TokenBatcher
from hpc_rl.policy.sft_rows import deal_lengths
from hpc_rl.recipe.schema import Policy

COUNTS = ("repaired", "truncated", "dropped")


def no_counts() -> dict[str, float]:
    return dict.fromkeys(COUNTS, 0.0)


@dataclass
class Position:
    """Where the run stands after `step`: the next ordinal, and the sequences that wait (token batches)."""

    step: int = 0
    cursor: int = 0
    waiting: dict[Key, Size] = field(default_factory=dict)  # oldest first
    counts: dict[str, float] = field(default_factory=no_counts)


@dataclass
class Plan:
    """`sizes` of a step's sequences, in order; `dealt` are their keys by data-parallel rank and micro-batch.

    `after` is the position behind it, `counts` what became of the rows that were taken for it.
    """

    after: Position
    sizes: dict[Key, Size]
    dealt: list[list[list[Key]]]
    counts: dict[str, float]

    @property
    def tokens(self) -> float:
        """Trained tokens of the step, over all ranks."""
        return float(sum(trained for _, trained, _ in self.sizes.values()))

    @property
    def kinds(self) -> int:
        """Which kinds of media the step has, on any rank."""
        return functools.reduce(operator.or_, (kinds for _, _, kinds in self.sizes.values()), 0)


class Planner:
    """Plans of steps. `rows` is the number of rows of an epoch, `end` the ordinal at which the run ends.

    `size(ordinal)` gives sizes, after `expect(first, last)` has said which ordinals will be asked for.
    """

    def __init__(
        self,
        policy: Policy,
        rows: int,
        end: int | None,
        ranks: int,
        size: Callable[[int], RowSizes],
        expect: Callable[[int, int], None],
    ) -> None:
        self._policy, self._rows, self._end, self._ranks = policy, rows, end, ranks
        self._size, self._expect = size, expect

    def until(self, ordinal: int) -> int:
        """`ordinal`, or the end of the epochs."""
        return ordinal if self._end is None else min(ordinal, self._end)

    def plan(self, step: int, at: Position) -> Plan | None:
        """The plan of `step`, which follows from the newest position.

        None if a whole epoch has nothing to train on. Raises DataError for a row that is refused.
        """
        if self._policy.batch_tokens is not None:
            return self._by_tokens(step, at)
        return self._by_rows(step, at)

    def steps_left(self, at: Position, lengths: Callable[[int], list[int]]) -> int:
        """Steps of token batches up to the end; `lengths` of the sequences of a row, by ordinal."""
        assert self._end is not None
        batcher, cursor, steps = self._batcher(at), at.cursor, 0
        while True:
            while batcher.hungry and cursor < self._end:
                for number, length in enumerate(lengths(cursor)):
                    batcher.add((cursor, number), length)
                cursor += 1
            if not batcher.take():
                return steps
            steps += 1

    def _by_rows(self, step: int, at: Position) -> Plan:
        size = self._policy.batch_size
        first = at.cursor + (step - at.step - 1) * size
        last = self.until(first + size)
        self._expect(first, last)
        counts, sizes = no_counts(), {}
        for ordinal in range(first, last):
            sizes.update(self._taken(ordinal, counts))
        keys = list(sizes)
        dealt = deal_lengths(self._policy, [tokens for tokens, _, _ in sizes.values()], self._ranks)
        after = Position(step, last, {}, at.counts)
        return Plan(after, sizes, [[[keys[i] for i in one] for one in mine] for mine in dealt], counts)

    def _by_tokens(self, step: int, at: Position) -> Plan | None:
        """As many rows as the look-ahead wants, then the fullest packings of what waits."""
        if step != at.step + 1:
            raise ValueError(f"step {step} of token batches was asked for after step {at.step}")
        batcher, counts, known = self._batcher(at), no_counts(), dict(at.waiting)
        cursor = at.cursor
        while batcher.hungry and cursor < self.until(cursor + 1):
            if cursor - at.cursor >= self._rows and not batcher.waiting:  # it would go round for ever
                return None
            self._expect(cursor, self.until(cursor + 64))
            for key, size in self._taken(cursor, counts):
                known[key] = size
                batcher.add(key, size[0])
            cursor += 1
        rows = batcher.take()
        forwards = -(-max(1, len(rows)) // self._ranks)
        dealt = [rows[rank :: self._ranks] for rank in range(self._ranks)]
        for mine in dealt:
            mine += [[] for _ in range(forwards - len(mine))]
        after = Position(step, cursor, {key: known[key] for key, _ in batcher.waiting}, at.counts)
        return Plan(after, {key: known[key] for one in rows for key in one}, dealt, counts)

    def _taken(self, ordinal: int, counts: dict[str, float]) -> Iterator[tuple[Key, Size]]:
        """The sequences of a row, which is counted."""
        row = self._size(ordinal)
        for name in COUNTS:
            counts[name] += getattr(row, name)
        for number, size in enumerate(row.sequences):
            yield (ordinal, number), size

    def _batcher(self, at: Position) -> TokenBatcher:
        """With the sequences that wait."""
        step_tokens = self._policy.batch_tokens
        assert step_tokens is not None
        batcher = TokenBatcher(step_tokens, min(self._policy.micro_batch_tokens or step_tokens, step_tokens))
        for key, (tokens, _, _) in at.waiting.items():
            batcher.add(key, tokens)
        return batcher
