"""Rows of a data set as prompts with run-wide ordinals.

Ordinal o belongs to epoch o // n and is row `order(epoch)[o % n]`: the order of the whole run is a
function of (data set, seed), so a resumed run needs to know only how many steps were done. The
fingerprint of the data set is saved with each checkpoint and compared on resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from hpc_rl.data.order import epoch_order
from hpc_rl.data.prompts import prompt_of
from hpc_rl.data.rows import load_rows
from hpc_rl.recipe.schema import DatasetSpec
from hpc_rl.types import Prompt


class PromptSource:
    """`source.prompt(ordinal)` for training data; evaluation data is read in file order."""

    def __init__(self, spec: DatasetSpec, *, base: Path | None, seed: int) -> None:
        self.spec, self.seed = spec, seed
        self.rows = load_rows(spec, base)
        if len(self.rows) == 0:
            raise ValueError(f"{spec.path}: the data set has no rows (split {spec.split!r})")
        self._order = lru_cache(maxsize=2)(self._epoch_order)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        return str(self.rows.fingerprint)

    def _epoch_order(self, epoch: int) -> Sequence[int]:
        return epoch_order(len(self.rows), self.seed, epoch, self.spec.shuffle)

    def prompt(self, ordinal: int) -> Prompt:
        """The prompt with this ordinal (training order)."""
        epoch, position = divmod(ordinal, len(self.rows))
        return self._make(ordinal, epoch, int(self._order(epoch)[position]))

    def in_file_order(self) -> list[Prompt]:
        """All rows once, unshuffled (evaluation)."""
        return [self._make(row, 0, row) for row in range(len(self.rows))]

    def _make(self, ordinal: int, epoch: int, row: int) -> Prompt:
        content, answer, fields = prompt_of(self.rows[row], self.spec, self.rows.where(row))
        return Prompt(ordinal=ordinal, epoch=epoch, row=row, content=content, answer=answer, fields=fields)


def prompt_seed(run_seed: int, purpose: str, ordinal: int) -> int:
    """A 31-bit seed for a prompt's samples, independent of who generates it and when."""
    digest = hashlib.blake2b(f"{run_seed}:{purpose}:{ordinal}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF
