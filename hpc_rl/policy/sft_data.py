"""SFT batches as a function of (data, seed, position): any number of ranks makes the same steps.

A step is planned from the sizes of its sequences, before any rank needs to have them: the next rows, or with
`policy.batch_tokens` the fullest packings of what waits. One rank alone knows sizes by encoding the rows. On
several ranks each tells the others those of its part of the rows (`sft_sizes.py`), and then encodes what it
trains on. With images in batches of rows, a row is read by the rank whose turn it is, without any plan, and
the ranks agree on how many forwards they run.
The position (`state`) is saved with the checkpoint: the next row, and the sequences that wait for a row to
fill.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from hpc_rl.data.encode import EncodedRow
from hpc_rl.data.errors import DataError
from hpc_rl.data.order import row_of, steps_of_epochs
from hpc_rl.data.rows import Rows
from hpc_rl.data.sizes import RowSizes
from hpc_rl.data.stream import RowStream
from hpc_rl.data.token_batches import Key, TokenBatcher
from hpc_rl.policy.sft_rows import (
    Agree,
    EvalRows,
    RowSource,
    deal,
    deal_lengths,
    samples_of,
)
from hpc_rl.policy.sft_sizes import Share, SharedSizes
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
class _Plan:
    """A step before its sequences are made: `keys` in order, and by rank and micro-batch (`dealt`).

    `sizes` are the tokens and the trained tokens of each key.
    """

    position: Position
    batcher: TokenBatcher | None
    keys: list[Key]
    dealt: list[list[list[Key]]]
    sizes: dict[Key, tuple[int, int]]
    counts: dict[str, float]


@dataclass
class _Step:
    """One step's sequences, those that this rank has made; `dealt` by rank and micro-batch.

    `tokens` are the trained ones: of all ranks, but where ranks have yet to agree.
    """

    step: int
    samples: list[TrainSample]
    dealt: dict[int, list[list[TrainSample]]] = field(default_factory=dict)
    tokens: float = 0.0
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))
    counted: bool = False


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
        share: Share | None = None,
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
        self._made: dict[Key, TrainSample] = {}  # in no step yet, where this rank encodes all rows
        self._planned: _Plan | None = None  # the step after `_now`, where sizes come before sequences
        self._before, self._empty = 0, _Empty(-1, 0)  # `_before`: the position before the newest step
        self._lengths: list[list[int]] | None = None
        self._share, self._workers = share, workers
        # Pictures of all that waits are too much to hold, and to read on every rank.
        by_sizes = self._batcher is not None if source.has_media else share is not None
        self._sizes = self._make_sizes("rows", self._index) if by_sizes else None
        self._start_sizes()

    # --- the position --------------------------------------------------------------------------------
    @property
    def total_steps(self) -> int:
        """Steps of the whole run, those done before included. To be asked on all ranks alike."""
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
        self._now, self._planned = _Step(self._at.step, []), None
        self._batcher, self._made = self._make_batcher(), {}
        self._start_sizes()
        behind = {ordinal: self._size(ordinal) for ordinal in sorted({key[0] for key in self._at.waiting})}
        for key in self._at.waiting:
            assert self._batcher is not None
            sequences = behind[key[0]].sequences
            if key[1] >= len(sequences):
                raise DataError(
                    f"sequence {key[1]} of row {self.row(key[0])} waited for its step at the checkpoint, "
                    "and is not made of that row any more: has the tokenizer, its chat template or "
                    "policy.max_length changed? Start a new run from the exported weights"
                )
            self._batcher.add(key, sequences[key[1]][0])
        self._made = {key: self._made[key] for key in self._at.waiting if key in self._made}

    def _start_sizes(self) -> None:
        if self._sizes is not None:
            end = self._end if self._end is not None else sys.maxsize
            self._sizes.start_at(self._at.cursor, end, [ordinal for ordinal, _ in self._at.waiting])

    def _make_sizes(self, name: str, index: Callable[[int], int]) -> SharedSizes:
        """Sizes of rows by ordinal, of which `index` makes the row's."""

        def measure() -> Callable[[int], RowSizes]:
            of = self._source.measure()
            return lambda ordinal: of(index(ordinal))

        return SharedSizes(measure, self._share, self._workers, name)

    def _make_batcher(self) -> TokenBatcher | None:
        policy = self._policy
        if policy.batch_tokens is None:
            return None
        room = min(policy.micro_batch_tokens or policy.batch_tokens, policy.batch_tokens)
        return TokenBatcher(policy.batch_tokens, room)

    # --- a step --------------------------------------------------------------------------------------
    def samples(self, step: int) -> list[TrainSample]:
        """The sequences of `step` (1-based), in order; where ranks share the work, those of this one.

        The last step of an epoch run may have fewer. Raises DataError for a row that cannot be encoded.
        """
        return self._take(step).samples

    def micro_batches(self, step: int, rank: int) -> tuple[list[list[TrainSample]], float]:
        """`(micro-batches of data-parallel rank `rank`, trained tokens of the whole step)`.

        Every rank gets equally many micro-batches; an empty one still takes part in collectives.
        """
        now = self._take(step)
        tokens = now.tokens
        if self._by_own_rows:
            assert rank == self._own_rank
            mine = deal(self._policy, now.samples, 1)[0]
            count, sums = len(mine), [tokens, *(now.counts[name] for name in COUNTS)]
            if self._agree is not None:
                count, sums = self._agree(count, sums)
            mine += [[] for _ in range(count - len(mine))]
            tokens = sums[0]
            self._count(now, dict(zip(COUNTS, sums[1:], strict=True)))
        else:
            mine = now.dealt[rank]
            self._count(now, now.counts)
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
        if self._sizes is not None:
            self._sizes.close()
        self._stream.close()
        if self._eval is not None:
            self._eval.close()

    # --- inside --------------------------------------------------------------------------------------
    def _maker(self, source: RowSource) -> Callable[[int], EncodedRow]:
        encode = source.encoder()
        return lambda ordinal: encode(self._index(ordinal))

    def _index(self, ordinal: int) -> int:
        return row_of(ordinal, len(self._rows), self._seed, self._source.spec.shuffle)[1]

    @property
    def _by_own_rows(self) -> bool:
        """Whether each rank reads its own rows of a batch, without a plan."""
        return self._source.has_media and self._sizes is None

    def _take(self, step: int) -> _Step:
        if step != self._now.step:
            self._before = self._at.cursor
            self._now = self._own_rows(step) if self._by_own_rows else self._made_step(step)
        return self._now

    def _until(self, ordinal: int) -> int:
        """`ordinal`, or the end of the epochs."""
        return ordinal if self._end is None else min(ordinal, self._end)

    def _own_rows(self, step: int) -> _Step:
        """This rank's part of `batch_size` rows from the position of `step`, which follows from the
        newest one's."""
        size, at = self._policy.batch_size, self._at
        first = at.cursor + (step - at.step - 1) * size
        ranges = [range(at, self._until(at + size)) for at in (first, first + size)]
        mine, following = (list(rows)[self._own_rank :: self._data_parallel] for rows in ranges)
        self._stream.want(mine)
        now = _Step(step, [])
        for ordinal in mine:
            row = self._stream.take(ordinal)
            for name in COUNTS:
                now.counts[name] += getattr(row, name)
            now.samples += samples_of(ordinal, row)
        now.tokens = float(sum(sum(sample.loss_mask) for sample in now.samples))
        self._at = Position(step, self._until(first + size), [], at.counts)
        self._stream.want(following)
        return now

    # --- a planned step ------------------------------------------------------------------------------
    def _made_step(self, step: int) -> _Step:
        """The step as planned, with the sequences that are made here: its own, or where this rank has
        encoded all rows, all."""
        plan, self._planned = self._planned, None
        if plan is None or plan.position.step != step:
            plan = self._plan(step)
        began = self._at.cursor
        ranks = range(self._data_parallel) if self._sizes is None else [self._own_rank]
        made = self._samples({key for rank in ranks for one in plan.dealt[rank] for key in one}, plan.sizes)
        self._at, self._batcher = plan.position, plan.batcher
        self._look_ahead(step + 1, began)
        return _Step(
            step,
            [made[key] for key in plan.keys if key in made],
            {rank: [[made[key] for key in one] for one in plan.dealt[rank]] for rank in ranks},
            float(sum(plan.sizes[key][1] for key in plan.keys)),
            plan.counts,
        )

    def _plan(self, step: int) -> _Plan:
        """The plan of a step, which follows from the newest one's position."""
        counts: dict[str, float] = dict.fromkeys(COUNTS, 0.0)
        sizes: dict[Key, tuple[int, int]] = {}

        def count(ordinal: int) -> list[Key]:
            row = self._size(ordinal)
            for name in COUNTS:
                counts[name] += getattr(row, name)
            found = {(ordinal, number): size for number, size in enumerate(row.sequences)}
            sizes.update(found)
            return list(found)

        if self._batcher is None:
            size, at = self._policy.batch_size, self._at
            first = at.cursor + (step - at.step - 1) * size
            last = self._until(first + size)
            self._expect(first, last)
            keys = [key for ordinal in range(first, last) for key in count(ordinal)]
            plan = deal_lengths(self._policy, [sizes[key][0] for key in keys], self._data_parallel)
            dealt = [[[keys[i] for i in one] for one in rank] for rank in plan]
            return _Plan(Position(step, last, [], at.counts), None, keys, dealt, sizes, counts)
        return self._plan_by_tokens(step, count, sizes, counts)

    def _plan_by_tokens(
        self,
        step: int,
        count: Callable[[int], list[Key]],
        sizes: dict[Key, tuple[int, int]],
        counts: dict[str, float],
    ) -> _Plan:
        """As many rows as the look-ahead wants, then the fullest packings of what waits."""
        assert self._batcher is not None
        if step != self._at.step + 1:
            raise ValueError(f"step {step} of token batches was asked for after step {self._at.step}")
        batcher = replace(self._batcher, waiting=list(self._batcher.waiting))
        cursor = began = self._at.cursor
        while batcher.hungry and self._until(cursor + 1) > cursor:
            if cursor - began >= len(self._rows) and not batcher.waiting:  # it would go round for ever
                raise self._nothing(f"a whole epoch ({len(self._rows)} rows) has")
            self._expect(cursor, self._until(cursor + 64))
            for key in count(cursor):
                batcher.add(key, sizes[key][0])
            cursor += 1
        waited = dict(batcher.waiting)
        rows = batcher.take()
        keys = [key for one in rows for key in one]
        for key in keys:
            if key not in sizes:
                sizes[key] = (waited[key], self._trained(key))
        forwards = -(-max(1, len(rows)) // self._data_parallel)
        dealt = [rows[rank :: self._data_parallel] for rank in range(self._data_parallel)]
        for mine in dealt:
            mine += [[] for _ in range(forwards - len(mine))]
        position = Position(step, cursor, [key for key, _ in batcher.waiting], self._at.counts)
        return _Plan(position, batcher, keys, dealt, sizes, counts)

    def _look_ahead(self, step: int, began: int) -> None:
        """Begin with what the next step needs; `began` is where the newest one began."""
        cursor = self._at.cursor
        if self._sizes is None:
            self._expect(cursor, self._until(2 * cursor - began))
            return
        self._sizes.forget(min([cursor, *(ordinal for ordinal, _ in self._at.waiting)]))
        if self._policy.steps is not None and step > self._policy.steps:
            return
        try:
            self._planned = self._plan(step)
        except DataError:
            return  # raised again at its step
        self._stream.want(sorted({key[0] for one in self._planned.dealt[self._own_rank] for key in one}))
        self._sizes.expect(2 * self._planned.position.cursor - cursor)

    def _expect(self, first: int, last: int) -> None:
        if self._sizes is not None:
            self._sizes.expect(last)
        else:
            self._stream.want(range(first, last))

    def _size(self, ordinal: int) -> RowSizes:
        """The sizes of a row. Without ranks to share the work with, it is encoded for that, and kept."""
        if self._sizes is not None:
            return self._sizes.of(ordinal)
        row = self._stream.take(ordinal)
        for sample in samples_of(ordinal, row):
            self._made[(ordinal, sample.sample)] = sample
        return RowSizes.of(row)

    def _trained(self, key: Key) -> int:
        """The trained tokens of a sequence that has waited."""
        if self._sizes is not None:
            return self._sizes.of(key[0]).sequences[key[1]][1]
        return sum(self._made[key].loss_mask)

    def _samples(self, keys: set[Key], sizes: dict[Key, tuple[int, int]]) -> dict[Key, TrainSample]:
        """The sequences of `keys`. Raises DataError where one is not as it was measured."""
        if self._sizes is None:
            return {key: self._made.pop(key) for key in keys}
        found: dict[Key, TrainSample] = {}
        for ordinal in sorted({key[0] for key in keys}):
            row = self._stream.take(ordinal)
            made = [(ordinal, number) for number in range(len(row.sequences))]
            for key, sample in zip(made, samples_of(ordinal, row), strict=True):
                if key in keys and sizes[key] == (len(sample.token_ids), sum(sample.loss_mask)):
                    found[key] = sample
        if lost := sorted(keys - found.keys()):
            raise DataError(
                f"{self._rows.where(self._index(lost[0][0]))}: its sequence {lost[0][1]} has other tokens "
                f"than the {sizes[lost[0]][0]} that the sizes of its media say; have its files changed? If "
                "not, the processor does not go by their sizes alone: use policy.batch_size"
            )
        return found

    def _count(self, now: _Step, counts: dict[str, float]) -> None:
        """Add a step's counts, over all ranks, to the run's; once."""
        if not now.counted:
            now.counted = True
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
            self._lengths = self._all_lengths()
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

    def _all_lengths(self) -> list[list[int]]:
        """Tokens of every sequence of every row."""
        sizes, count = self._make_sizes("all rows", lambda index: index), len(self._rows)
        sizes.start_at(0, count)
        found = []
        try:
            for index in range(count):
                if index % 1024 == 0:
                    sizes.forget(index)
                    sizes.expect(index + 2048)
                found.append([tokens for tokens, _ in sizes.of(index).sequences])
        finally:
            sizes.close()
        return found

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
