"""Batches of about so many tokens: best-fit decreasing over a look-ahead of sequences as they come.

Every step takes the row with the sequence that waits longest, and the fullest rows besides; what is left
stays for the next step. What a step trains on is a function of the sequences alone, not of how many ranks
there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpc_rl.data.packing import best_fit

Key = tuple[int, int]  # ordinal of the row, number of its sequence
LOOK_AHEAD = 4


@dataclass
class TokenBatcher:
    """`row_tokens` is the room of one packed row; a step has `step_tokens // row_tokens` rows."""

    step_tokens: int
    row_tokens: int
    waiting: list[tuple[Key, int]] = field(default_factory=list)  # with lengths, oldest first
    tokens: int = 0

    @property
    def rows(self) -> int:
        return max(1, self.step_tokens // self.row_tokens)

    @property
    def hungry(self) -> bool:
        """Whether more sequences should be added before the next step is taken."""
        return self.tokens < LOOK_AHEAD * self.rows * self.row_tokens

    def add(self, key: Key, length: int) -> None:
        self.waiting.append((key, length))
        self.tokens += length

    def take(self) -> list[list[Key]]:
        """The rows of the next step (fewer, or none, when nothing is left)."""
        waiting = self.waiting
        lengths = [length for _, length in waiting]
        bins = best_fit(lengths, self.row_tokens)
        for one in bins:
            one.sort()
        bins.sort(key=lambda one: (one[0] != 0, -sum([lengths[i] for i in one]), one[0]))
        chosen = bins[: self.rows]
        gone = {i for one in chosen for i in one}
        self.waiting = [entry for i, entry in enumerate(waiting) if i not in gone]
        self.tokens -= sum([lengths[i] for i in gone])
        return [[waiting[i][0] for i in one] for one in chosen]
