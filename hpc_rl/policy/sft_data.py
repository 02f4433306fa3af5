"""SFT batches as a function of (data, seed, position): any number of ranks makes the same steps.

Text: every rank works out the whole batch and takes its part. Tokenising the same rows on each rank costs
less than telling each other the lengths, and leaves no collective in the data path. With images, a row is
read by the data-parallel rank that trains it alone, and the ranks agree on how many forwards they run.
The position (`state`) is saved with the checkpoint: the next row, and with `policy.batch_tokens` the
sequences that wait for a row to fill.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from hpc_rl.data.encode import EncodedRow
from hpc_rl.data.errors import DataError
from hpc_rl.data.order import row_of, steps_of_epochs
from hpc_rl.data.rows import Rows
from hpc_rl.data.stream import RowStream
from hpc_rl.data.token_batches import Key, TokenBatcher
from hpc_rl.policy.sft_rows import (
    Agree,
    EvalRows,
    RowSource,
    deal,
    samples_of,
)
from hpc_rl.recipe.schema import Policy
from hpc_rl.types import TrainSample

LOG = logging.getLogger("hpc_rl.policy")
COUNTS = ("repaired", "truncated", "dropped")
EMPTY_STEPS_LIMIT = 10


@dataclass
class Position:
    """Where the run stands after `step`: the next ordinal, and the sequences that wait (token batches)."""

    step: int = 0
    cursor: int = 0
    waiting: list[Key] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))


@dataclass
class _Step:
    """One step's sequences: of this rank alone (with images) or of all; `rows` are packed already."""

    step: int
    samples: list[TrainSample]
    rows: list[list[TrainSample]] | None = None
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))
    agreed: bool = False

    def add(self, ordinal: int, row: EncodedRow) -> list[TrainSample]:
        """The samples of a row, which is counted."""
        for name in COUNTS:
            self.counts[name] += getattr(row, name)
        return samples_of(ordinal, row)


@dataclass
class _Empty:
    """`steps` in a row of which nothing was left to learn, up to `last`; `began` is the position before."""

    last: int
    began: int
    steps: int = 1


class SftData:
    """Sequences of the recipe's training data, step by step."""

    def __init__(
        self,
        source: RowSource,
        policy: Policy,
        seed: int,
        data_parallel: int,
        *,
        held_out: RowSource | None = None,
        rank: int = 0,
        workers: int = 0,
        blank: TrainSample | None = None,
        agree: Agree | None = None,
    ) -> None:
        self._source, self._policy, self._seed, self._data_parallel = source, policy, seed, data_parallel
        self._rows: Rows = source.rows
        self._own_rank, self._blank, self._agree = rank, blank, agree
        self._stream: RowStream[EncodedRow] = RowStream(lambda: self._maker(source), workers)
        self._eval = EvalRows(held_out, policy, workers) if held_out is not None else None
        # With epochs the run ends with the last row; with steps it goes round.
        self._end = None if policy.steps is not None else len(self._rows) * (policy.epochs or 1)
        self._at, self._now = Position(), _Step(0, [])
        self._batcher = self._make_batcher()
        self._waiting: dict[Key, TrainSample] = {}
        self._before, self._empty = 0, _Empty(-1, 0)  # `_before`: the position before the newest step
        self._lengths: list[list[int]] | None = None
        self._workers = workers

    # --- the position --------------------------------------------------------------------------------
    @property
    def total_steps(self) -> int:
        """Steps of the whole run, those done before included."""
        if self._policy.steps is not None:
            return self._policy.steps
        assert self._end is not None
        if self._batcher is not None:
            return self._at.step + self._token_steps_left()
        return self._at.step + steps_of_epochs(
            max(0, self._end - self._at.cursor), self._policy.batch_size, 1
        )

    def state(self) -> bytes:
        """The position after the newest step, the same on every rank."""
        found = {"rows": self._rows.fingerprint, "name": self._rows.name, "seed": self._seed}
        at = self._at
        found |= {"step": at.step, "cursor": at.cursor, "waiting": at.waiting, "counts": at.counts}
        return json.dumps(found).encode()

    def load_state(self, raw: bytes) -> None:
        """Go on from a saved position. Raises DataError if it is one in other data or another order."""
        saved = json.loads(raw)
        if saved["rows"] != self._rows.fingerprint:
            raise DataError(
                f"the checkpoint was trained on other rows than {self._rows.name} has now (its data were "
                f"{saved['name']}): position {saved['cursor']} would mean other rows. Give the same data, or "
                "start a new run from the exported weights"
            )
        if saved["seed"] != self._seed:
            raise DataError(
                f"the checkpoint's rows were in the order of seed {saved['seed']}; keep that seed"
            )
        waiting = [(int(a), int(b)) for a, b in saved["waiting"]]
        if waiting and self._batcher is None:
            raise DataError(
                "the checkpoint was made with policy.batch_tokens: keep it (its value may change)"
            )
        self._at = Position(saved["step"], saved["cursor"], waiting, saved["counts"])
        self._restart()

    def start_at(self, step: int) -> None:
        """Go on after `step` of a run whose checkpoint has no position (fixed batches only)."""
        self._at = Position(step, step * self._policy.batch_size)
        self._restart()

    def _restart(self) -> None:
        self._stream.forget()
        self._now = _Step(self._at.step, [])
        self._batcher, self._waiting = self._make_batcher(), {}
        wanted = set(self._at.waiting)
        for ordinal in sorted({ordinal for ordinal, _ in wanted}):
            for sample in samples_of(ordinal, self._stream.take(ordinal)):
                if (ordinal, sample.sample) in wanted:
                    self._waiting[(ordinal, sample.sample)] = sample
        for key in self._at.waiting:
            assert self._batcher is not None
            if key not in self._waiting:
                raise DataError(
                    f"sequence {key[1]} of row {self.row(key[0])} waited for its step at the checkpoint, "
                    "and is not made of that row any more: has the tokenizer, its chat template or "
                    "policy.max_length changed? Start a new run from the exported weights"
                )
            self._batcher.add(key, len(self._waiting[key].token_ids))

    def _make_batcher(self) -> TokenBatcher | None:
        policy = self._policy
        if policy.batch_tokens is None:
            return None
        if self._source.has_media:
            raise DataError("policy.batch_tokens does not work with images yet: use policy.batch_size")
        room = min(policy.micro_batch_tokens or policy.batch_tokens, policy.batch_tokens)
        return TokenBatcher(policy.batch_tokens, room)

    # --- a step --------------------------------------------------------------------------------------
    def samples(self, step: int) -> list[TrainSample]:
        """The sequences of `step` (1-based), in order; with images, those of this rank.

        The last step of an epoch run may have fewer. Raises DataError for a row that cannot be encoded.
        """
        return self._take(step).samples

    def micro_batches(self, step: int, rank: int) -> tuple[list[list[TrainSample]], float]:
        """`(micro-batches of data-parallel rank `rank`, trained tokens of the whole step)`.

        Every rank gets equally many micro-batches; an empty one still takes part in collectives.
        """
        now = self._take(step)
        tokens = float(sum(sum(sample.loss_mask) for sample in now.samples))
        if self._source.has_media:
            assert rank == self._own_rank
            mine = deal(self._policy, now.samples, 1)[0]
            count, sums = len(mine), [tokens, *(now.counts[name] for name in COUNTS)]
            if self._agree is not None:
                count, sums = self._agree(count, sums)
            mine += [[] for _ in range(count - len(mine))]
            self._count(now, dict(zip(COUNTS, sums[1:], strict=True)))
            return [self._with_picture(samples) for samples in mine], sums[0]
        self._count(now, now.counts)
        if now.rows is not None:
            mine = now.rows[rank :: self._data_parallel]
            mine += [[] for _ in range(-(-max(1, len(now.rows)) // self._data_parallel) - len(mine))]
        else:
            mine = deal(self._policy, now.samples, self._data_parallel)[rank]
        return [self._with_picture(samples) for samples in mine], tokens

    def metrics(self) -> dict[str, float]:
        """Of the newest step: epochs seen, and what became of rows since the run began."""
        found = {f"data/{name}": count for name, count in self._at.counts.items()}
        return {"data/epoch": self._at.cursor / len(self._rows)} | found

    def skipped(self, step: int) -> dict[str, float]:
        """The metrics of a step that had no token to train on, the same on every rank.

        One such step is bad luck. Raises DataError after ten in a row, and after a whole epoch of them.
        """
        now = self._empty
        if now.last == step - 1:
            now.last, now.steps = step, now.steps + 1
        elif now.last != step:
            now = self._empty = _Empty(step, self._before)
        rows = self._at.cursor - now.began
        if now.steps >= EMPTY_STEPS_LIMIT or rows >= len(self._rows):
            counts = ", ".join(f"{self._at.counts[name]:.0f} {name}" for name in COUNTS[1:])
            raise self._nothing(
                f"{now.steps} steps in a row ({rows} rows; {counts} since the run began) have"
            )
        return self.metrics()

    def row(self, ordinal: int) -> int:
        """The number in its file of the row that the sample with this ordinal is made of."""
        if ordinal < 0:
            return -1  # the blank picture
        return self._rows.number(self._index(ordinal))

    @property
    def eval_rows(self) -> int:
        """Rows of validation data."""
        return 0 if self._eval is None else len(self._eval)

    def eval_micro_batches(self, rank: int) -> Iterator[list[TrainSample]]:
        """The validation data of data-parallel rank `rank` in file order, the same at every evaluation."""
        assert self._eval is not None
        for mine in self._eval.micro_batches(rank, self._data_parallel, self._agree):
            yield self._with_picture(mine)

    def close(self) -> None:
        """Stop the threads."""
        self._stream.close()
        if self._eval is not None:
            self._eval.close()

    # --- inside --------------------------------------------------------------------------------------
    def _maker(self, source: RowSource) -> Callable[[int], EncodedRow]:
        encode = source.encoder()
        return lambda ordinal: encode(self._index(ordinal))

    def _index(self, ordinal: int) -> int:
        return row_of(ordinal, len(self._rows), self._seed, self._source.spec.shuffle)[1]

    def _take(self, step: int) -> _Step:
        if step != self._now.step:
            self._before = self._at.cursor
            self._now = self._by_tokens(step) if self._batcher is not None else self._by_rows(step)
        return self._now

    def _mine(self, first: int, count: int) -> list[int]:
        """The ordinals from `first` on that this rank encodes: with images its own, else all."""
        last = first + count if self._end is None else min(first + count, self._end)
        if not self._source.has_media:
            return list(range(first, last))
        return list(range(first + self._own_rank, last, self._data_parallel))

    def _by_rows(self, step: int) -> _Step:
        """`batch_size` rows from the position of `step`, which follows from the newest one's."""
        size, at = self._policy.batch_size, self._at
        first = at.cursor + (step - at.step - 1) * size
        ordinals = self._mine(first, size)
        self._stream.want(ordinals)
        now = _Step(step, [])
        for ordinal in ordinals:
            now.samples += now.add(ordinal, self._stream.take(ordinal))
        last = first + size if self._end is None else min(first + size, self._end)
        self._at = Position(step, last, [], at.counts)
        self._stream.want(self._mine(last, size))
        return now

    def _by_tokens(self, step: int) -> _Step:
        """As many rows as the look-ahead wants, then the fullest packings of what waits."""
        assert self._batcher is not None
        if step != self._at.step + 1:
            raise ValueError(f"step {step} of token batches was asked for after step {self._at.step}")
        now = _Step(step, [], [])
        cursor = began = self._at.cursor
        while self._batcher.hungry and (self._end is None or cursor < self._end):
            if cursor - began >= len(self._rows) and not self._waiting:  # it would go round for ever
                raise self._nothing(f"a whole epoch ({len(self._rows)} rows) has")
            self._stream.want(self._mine(cursor, 64))
            for sample in now.add(cursor, self._stream.take(cursor)):
                key = (cursor, sample.sample)
                self._waiting[key] = sample
                self._batcher.add(key, len(sample.token_ids))
            cursor += 1
        now.rows = [[self._waiting.pop(key) for key in one] for one in self._batcher.take()]
        now.samples = [sample for one in now.rows for sample in one]
        waiting = [key for key, _ in self._batcher.waiting]
        self._at = Position(step, cursor, waiting, self._at.counts)
        self._stream.want(self._mine(cursor, cursor - began))
        return now

    def _count(self, now: _Step, counts: dict[str, float]) -> None:
        """Add a step's counts, over all ranks, to the run's; once."""
        if not now.agreed:
            now.agreed = True
            self._at.counts = {name: self._at.counts[name] + counts[name] for name in COUNTS}

    def _token_steps_left(self) -> int:
        """Steps of token batches up to the end of the epochs: the packing of the lengths alone.

        Encodes all rows, once.
        """
        assert self._end is not None
        assert self._batcher is not None
        if self._lengths is None:
            LOG.info(
                "policy.epochs with policy.batch_tokens: counting the tokens of %d rows", len(self._rows)
            )
            self._lengths = self._source.lengths(self._workers)
            if not any(self._lengths):
                raise self._nothing(f"all {len(self._lengths)} rows have")
        batcher = replace(self._batcher, waiting=list(self._batcher.waiting))
        cursor, steps = self._at.cursor, 0
        while True:
            while batcher.hungry and cursor < self._end:
                for number, length in enumerate(self._lengths[self._index(cursor)]):
                    batcher.add((cursor, number), length)
                cursor += 1
            if not batcher.take():
                return steps
            steps += 1

    def _nothing(self, what: str) -> DataError:
        """`what` ends in "has" or "have"."""
        limit, overlong = self._policy.max_length, self._source.spec.overlong
        return DataError(
            f"{what} no token to train on ({self._rows.name}): sequences above policy.max_length ({limit}) "
            f"are cut or dropped (data.train.overlong: {overlong}), and one without a trained token is "
            "dropped. Raise policy.max_length, or look at what data.train's format and columns say is trained"
        )

    def _with_picture(self, samples: list[TrainSample]) -> list[TrainSample]:
        """With a blank picture where there is none and every forward needs one."""
        if self._blank is None or any(sample.media for sample in samples):
            return samples
        return [*samples, self._blank]


def total_steps(policy: Policy, rows: int, per_row: int = 1) -> int:
    """Optimizer steps of the run; each row makes `per_row` sequences (the group size, for RL)."""
    if policy.steps is not None:
        return policy.steps
    return steps_of_epochs(rows, max(1, policy.batch_size // per_row), policy.epochs or 1)
