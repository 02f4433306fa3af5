"""SFT batches as a pure function of (data, seed, step): resuming needs no loader state at all.

Every rank works out the whole batch and takes its part. Tokenising the same rows on each rank costs less
than telling each other the lengths, and leaves no collective in the data path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hpc_rl.data.encode import Encoder
from hpc_rl.data.order import row_of, step_ordinals, steps_of_epochs
from hpc_rl.data.packing import pack, pack_fixed
from hpc_rl.data.rows import Rows
from hpc_rl.recipe.schema import DatasetSpec, Policy
from hpc_rl.types import TrainSample


class SftData:
    """Sequences of the recipe's training data, `batch_size` per step."""

    def __init__(
        self,
        rows: Rows,
        spec: DatasetSpec,
        tokenizer: Any,
        policy: Policy,
        seed: int,
        data_parallel: int,
        held_out: tuple[Rows, DatasetSpec] | None = None,
    ) -> None:
        self._held_out = held_out
        self._rows, self._spec, self._tokenizer = rows, spec, tokenizer
        self._policy, self._seed, self._data_parallel = policy, seed, data_parallel
        self.total_steps = total_steps(policy, len(rows))
        # With epochs the run ends with the last row; with steps it goes round.
        self._end = None if policy.steps is not None else len(rows) * (policy.epochs or 1)

    def samples(self, step: int) -> list[TrainSample]:
        """The sequences of `step` (1-based), in order. The last step of an epoch run may have fewer."""
        found = []
        for ordinal in step_ordinals(step, self._policy.batch_size):
            if self._end is not None and ordinal >= self._end:
                break
            found += self._samples(ordinal, self._rows, self.row(ordinal), self._spec)
        return found

    def _samples(self, ordinal: int, rows: Rows, row: int, spec: DatasetSpec) -> list[TrainSample]:
        encode = Encoder(self._tokenizer, spec, self._policy.max_length)
        found = []
        for number, one in enumerate(encode(rows[row], f"{rows.name}: row {row}").sequences):
            zeros = [0.0] * len(one.token_ids)
            found.append(TrainSample(ordinal, number, one.token_ids, one.loss_mask, zeros, zeros))
        return found

    def row(self, ordinal: int) -> int:
        """The row of the data that the sample with this ordinal is made of."""
        return row_of(ordinal, len(self._rows), self._seed, self._spec.shuffle)[1]

    @property
    def eval_rows(self) -> int:
        """Rows of validation data."""
        return 0 if self._held_out is None else len(self._held_out[0])

    def eval_micro_batches(self, rank: int) -> Iterator[list[TrainSample]]:
        """The validation data of data-parallel rank `rank` in file order, the same at every evaluation.

        Every rank gets equally many micro-batches; an empty one still takes part in collectives.
        """
        assert self._held_out is not None
        rows, spec = self._held_out
        samples = [one for row in range(len(rows)) for one in self._samples(row, rows, row, spec)]
        for indices in self._deal(samples)[rank]:
            yield [samples[i] for i in indices]

    def micro_batches(self, step: int, rank: int) -> tuple[list[list[TrainSample]], float]:
        """`(micro-batches of data-parallel rank `rank`, trained tokens of the whole step)`."""
        samples = self.samples(step)
        tokens = float(sum(sum(sample.loss_mask) for sample in samples))
        return [[samples[i] for i in indices] for indices in self._deal(samples)[rank]], tokens

    def _deal(self, samples: list[TrainSample]) -> list[list[list[int]]]:
        """Indices of `samples`, by rank and micro-batch."""
        lengths = [len(sample.token_ids) for sample in samples]
        if self._policy.micro_batch_size is not None:
            return pack_fixed(lengths, self._policy.micro_batch_size, self._data_parallel)
        return pack(lengths, self._policy.micro_batch_tokens or max(lengths), self._data_parallel)


def total_steps(policy: Policy, rows: int, per_row: int = 1) -> int:
    """Optimizer steps of the run; each row makes `per_row` sequences (the group size, for RL)."""
    if policy.steps is not None:
        return policy.steps
    return steps_of_epochs(rows, max(1, policy.batch_size // per_row), policy.epochs or 1)
