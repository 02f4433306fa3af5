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

import functools
import json
import logging
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hpc_rl.data.encode import IMAGE, VIDEO, EncodedRow
from hpc_rl.data.errors import DataError
from hpc_rl.data.multimodal import kinds_of
from hpc_rl.data.order import row_of, steps_of_epochs
from hpc_rl.data.rows import Rows
from hpc_rl.data.sizes import RowSizes
from hpc_rl.data.stream import RowStream
from hpc_rl.data.token_batches import Key
from hpc_rl.policy.sft_plan import COUNTS, Plan, Planner, Position, no_counts
from hpc_rl.policy.sft_rows import (
    Agree,
    EvalRows,
    RowSource,
    agreed,
    deal,
    samples_of,
)
from hpc_rl.policy.sft_sequences import OwnSequences, Sequences, WholeSequences
from hpc_rl.policy.sft_sizes import Share, SharedSizes
from hpc_rl.recipe.schema import Policy
from hpc_rl.types import TrainSample

LOG = logging.getLogger("hpc_rl.policy")
EMPTY_STEPS_LIMIT = 10


@dataclass
class _Step:
    """One step's sequences, those that this rank has made; `dealt` by rank and micro-batch.

    `denominator` is what its loss is divided by (trained tokens, or pairs), `kinds` are those of media: of
    all ranks, but where ranks have yet to agree, by `rows`.
    """

    step: int
    samples: list[TrainSample]
    dealt: dict[int, list[list[TrainSample]]] = field(default_factory=dict)
    denominator: float = 0.0
    counts: dict[str, float] = field(default_factory=no_counts)
    kinds: int = 0
    rows: list[EncodedRow] = field(default_factory=list)
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
        blank: Callable[[int], TrainSample] | None = None,
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
        self._before, self._empty = 0, _Empty(-1, 0)  # `_before`: the position before the newest step
        self._lengths: list[list[int]] | None = None
        self._share, self._workers = share, workers
        by_tokens = policy.batch_tokens is not None
        # Pictures of all that waits are too much to hold, and to read on every rank.
        by_sizes = by_tokens if source.has_media else share is not None
        self._by_turns = source.has_media and not by_tokens  # each rank reads its own rows, without a plan
        self._ahead = by_sizes  # the next step is planned while one runs: sizes come before sequences
        self._sequences: Sequences = WholeSequences(self._stream)
        if by_sizes:
            sizes = self._make_sizes("rows", self._index)
            self._sequences = OwnSequences(self._stream, sizes, rank, self._where)
        self._planner = Planner(
            policy, len(self._rows), self._end, data_parallel, self._sequences.size, self._sequences.expect
        )
        self._next: Plan | None = None
        self._sequences.start_at(self._at, self._end)

    # --- the position --------------------------------------------------------------------------------
    @property
    def total_steps(self) -> int:
        """Steps of the whole run, those done before included. To be asked on all ranks alike."""
        if self._policy.steps is not None:
            return self._policy.steps
        assert self._end is not None
        if self._policy.batch_tokens is not None:
            return self._at.step + self._token_steps_left()
        return self._at.step + steps_of_epochs(
            max(0, self._end - self._at.cursor), self._policy.batch_size, 1
        )

    def state(self) -> bytes:
        """The position after the newest step, the same on every rank."""
        found = {"rows": self._rows.fingerprint, "name": self._rows.name, "seed": self._seed}
        at = self._at
        found |= {"step": at.step, "cursor": at.cursor, "waiting": list(at.waiting), "counts": at.counts}
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
        if waiting and self._policy.batch_tokens is None:
            raise DataError(
                "the checkpoint was made with policy.batch_tokens: keep it (its value may change)"
            )
        self._restart(Position(saved["step"], saved["cursor"], {}, saved["counts"]), waiting)

    def start_at(self, step: int) -> None:
        """Go on after `step` of a run whose checkpoint has no position (fixed batches only)."""
        self._restart(Position(step, step * self._policy.batch_size), [])

    def _restart(self, at: Position, waiting: list[Key]) -> None:
        self._stream.forget()
        self._at, self._now, self._next = at, _Step(at.step, []), None
        behind = sorted({ordinal for ordinal, _ in waiting})
        self._sequences.start_at(at, self._end, behind)
        sizes = {ordinal: self._sequences.size(ordinal).sequences for ordinal in behind}
        for ordinal, number in waiting:
            if number >= len(sizes[ordinal]):
                raise DataError(
                    f"sequence {number} of row {self.row(ordinal)} waited for its step at the checkpoint, "
                    "and is not made of that row any more: has the tokenizer, its chat template or "
                    "policy.max_length changed? Start a new run from the exported weights"
                )
            at.waiting[(ordinal, number)] = sizes[ordinal][number]
        self._sequences.keep(at)

    def _make_sizes(self, name: str, index: Callable[[int], int]) -> SharedSizes:
        """Sizes of rows by ordinal, of which `index` makes the row's."""

        def measure() -> Callable[[int], RowSizes]:
            of = self._source.measure()
            return lambda ordinal: of(index(ordinal))

        return SharedSizes(measure, self._share, self._workers, name)

    # --- a step --------------------------------------------------------------------------------------
    def samples(self, step: int) -> list[TrainSample]:
        """The sequences of `step` (1-based), in order; where ranks share the work, those of this one.

        The last step of an epoch run may have fewer. Raises DataError for a row that cannot be encoded.
        """
        return self._take(step).samples

    def micro_batches(self, step: int, rank: int) -> tuple[list[list[TrainSample]], float]:
        """`(micro-batches of data-parallel rank `rank`, trained tokens, or pairs, of the whole step)`.

        Every rank gets equally many micro-batches; an empty one still takes part in collectives.
        """
        now = self._take(step)
        denominator = now.denominator
        if self._by_turns:
            assert rank == self._own_rank
            mine = deal(self._policy, now.samples, 1)[0]
            sums = [denominator, *(now.counts[name] for name in COUNTS)]
            count, sums, now.kinds = agreed(self._agree, len(mine), sums, now.rows)
            mine += [[] for _ in range(count - len(mine))]
            denominator = sums[0]
            self._count(now, dict(zip(COUNTS, sums[1:], strict=True)))
        else:
            mine = now.dealt[rank]
            self._count(now, now.counts)
        return [self._with_blanks(samples, now.kinds) for samples in mine], denominator

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

    def _where(self, ordinal: int) -> str:
        return self._rows.where(self._index(ordinal))

    @property
    def eval_rows(self) -> int:
        """Rows of validation data."""
        return 0 if self._eval is None else len(self._eval)

    def eval_micro_batches(self, rank: int) -> Iterator[list[TrainSample]]:
        """The validation data of data-parallel rank `rank` in file order, the same at every evaluation."""
        assert self._eval is not None
        for mine, kinds in self._eval.micro_batches(rank, self._data_parallel, self._agree):
            yield self._with_blanks(mine, kinds)

    def close(self) -> None:
        """Stop the threads."""
        self._sequences.close()
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
            self._now = self._own_rows(step) if self._by_turns else self._planned(step)
        return self._now

    def _own_rows(self, step: int) -> _Step:
        """This rank's part of `batch_size` rows from the position of `step`, which follows from the
        newest one's."""
        size, at, until = self._policy.batch_size, self._at, self._planner.until
        first = at.cursor + (step - at.step - 1) * size
        ranges = [range(begin, until(begin + size)) for begin in (first, first + size)]
        mine, following = (list(rows)[self._own_rank :: self._data_parallel] for rows in ranges)
        self._stream.want(mine)
        now = _Step(step, [])
        for ordinal in mine:
            row = self._stream.take(ordinal)
            now.rows.append(row)
            for name in COUNTS:
                now.counts[name] += getattr(row, name)
            now.samples += samples_of(ordinal, row)
        tokens = sum(sum(sample.loss_mask) for sample in now.samples)
        now.denominator = float(len(now.samples) if self._source.pairs else tokens)
        self._at = Position(step, until(first + size), {}, at.counts)
        self._stream.want(following)
        return now

    def _planned(self, step: int) -> _Step:
        """The step with the sequences that are made here: those of this rank, or of all."""
        plan, self._next = self._next, None
        if plan is None or plan.after.step != step:
            plan = self._plan(step)
        mine = {rank: plan.dealt[rank] for rank in self._sequences.mine(plan)}
        keys = {key for dealt in mine.values() for one in dealt for key in one}
        made = self._sequences.make(keys, plan.sizes)
        taken, self._at = plan.after.cursor - self._at.cursor, plan.after
        self._sequences.keep(self._at)
        self._begin_next(step + 1, taken)
        dealt = {rank: [[made[key] for key in one] for one in rows] for rank, rows in mine.items()}
        samples = [made[key] for key in plan.sizes if key in made]
        denominator = float(len(plan.sizes)) if self._source.pairs else plan.tokens
        return _Step(step, samples, dealt, denominator, plan.counts, plan.kinds)

    def _plan(self, step: int) -> Plan:
        plan = self._planner.plan(step, self._at)
        if plan is None:
            raise self._nothing(f"a whole epoch ({len(self._rows)} rows) has")
        return plan

    def _begin_next(self, step: int, taken: int) -> None:
        """What `step` needs, of about as many rows as were taken for the one before."""
        cursor = self._at.cursor
        if not self._ahead:
            self._sequences.expect(cursor, self._planner.until(cursor + taken))
            return
        if self._policy.steps is not None and step > self._policy.steps:
            return
        try:
            self._next = self._plan(step)
        except DataError:
            return  # raised again at its step
        self._sequences.begin(key for one in self._next.dealt[self._own_rank] for key in one)
        behind = self._next.after.cursor
        self._sequences.expect(behind, self._planner.until(behind + taken))

    def _count(self, now: _Step, counts: dict[str, float]) -> None:
        """Add a step's counts, over all ranks, to the run's; once."""
        if not now.counted:
            now.counted = True
            self._at.counts = {name: self._at.counts[name] + counts[name] for name in COUNTS}

    def _token_steps_left(self) -> int:
        """Steps of token batches up to the end of the epochs: the packing of the lengths alone.

        Encodes all rows, once.
        """
        if self._lengths is None:
            LOG.info(
                "policy.epochs with policy.batch_tokens: counting the tokens of %d rows", len(self._rows)
            )
            self._lengths = self._all_lengths()
            if not any(self._lengths):
                raise self._nothing(f"all {len(self._lengths)} rows have")
        lengths = self._lengths
        return self._planner.steps_left(self._at, lambda ordinal: lengths[self._index(ordinal)])

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
                found.append([tokens for tokens, _, _ in sizes.of(index).sequences])
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

    def _with_blanks(self, samples: list[TrainSample], kinds: int) -> list[TrainSample]:
        """With a blank of each kind of media that is not there and that some rank has beside this forward;
        of one kind at least, where every forward needs one."""
        if self._blank is None:
            return samples
        has = functools.reduce(operator.or_, (kinds_of(sample.media) for sample in samples), 0)
        missing = (kinds or IMAGE) & ~has
        return [*samples, *(self._blank(kind) for kind in (IMAGE, VIDEO) if missing & kind)]


def total_steps(policy: Policy, rows: int, per_row: int = 1) -> int:
    """Optimizer steps of the run; each row makes `per_row` sequences (the group size, for RL)."""
    if policy.steps is not None:
        return policy.steps
    return steps_of_epochs(rows, max(1, policy.batch_size // per_row), policy.epochs or 1)
