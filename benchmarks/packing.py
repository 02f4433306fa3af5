"""Sequences packed per second, ours over TRL's best-fit decreasing: `python -m benchmarks.packing`.

20,000 sequences of lognormal length into rows of 4096 tokens, several times over in each timing. Both sides
start from an Arrow column of token ids and end with the packed rows and the lengths in them. TRL packs its
data set in blocks of 1000 rows; ours streams as training does: a look-ahead of four steps of 32 rows, of
which each step takes the fullest. The shares of tokens in the rows (efficiency) are printed beside the
ratio; ours must be at least 0.995.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks._report import control, interleave, report
from hpc_rl.data.token_batches import TokenBatcher

SEQUENCES, ROW, STEP_ROWS = 20_000, 4096, 32
REPEATS = 8  # one packing is some tenths of a second: too short to be timed alone
GOAL, EFFICIENCY = 1.0, 0.995


def make_column(seed: int = 0) -> pa.ListArray:
    """Token ids of sequences whose lengths are lognormal (median 245, mean about 340), at most a row."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(5.5, 0.8, SEQUENCES).astype(np.int64), 1, ROW)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = rng.integers(0, 32_000, int(offsets[-1]), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))


def pack_ours(column: pa.ListArray) -> pa.Table:
    """Stream the sequences through the batcher; the packed rows as a table like TRL's."""
    lengths = pc.list_value_length(column).to_pylist()
    batcher = TokenBatcher(STEP_ROWS * ROW, ROW)
    rows: list[list[int]] = []
    coming = 0
    while True:
        while batcher.hungry and coming < len(lengths):
            batcher.add((coming, 0), lengths[coming])
            coming += 1
        step = batcher.take()
        if not step:
            break
        rows += [[ordinal for ordinal, _ in row] for row in step]
    order = np.fromiter((index for row in rows for index in row), dtype=np.int64, count=len(lengths))
    taken = column.take(pa.array(order))
    sizes = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    starts = taken.offsets.to_numpy()[sizes]
    ids = pa.ListArray.from_arrays(pa.array(starts), taken.values)
    parts = pa.ListArray.from_arrays(pa.array(sizes), pc.list_value_length(taken))
    return pa.table({"input_ids": ids, "seq_lengths": parts})


def efficiency(rows: int, tokens: int) -> float:
    return tokens / (rows * ROW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    import datasets
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    column = make_column()
    tokens = len(column.values)
    made: dict[str, Any] = {}

    def rate(name: str, pack: Callable[[], Any]) -> float:
        began = time.perf_counter()
        for _ in range(REPEATS):
            made[name] = pack()
        return REPEATS * SEQUENCES / (time.perf_counter() - began)

    data = datasets.Dataset(pa.table({"input_ids": column}))
    ours = functools.partial(rate, "ours", lambda: pack_ours(column))
    trl = functools.partial(rate, "trl", lambda: pack_dataset(data, ROW, "bfd"))

    ours(), trl()  # imports and caches
    left, right = interleave(ours, trl, arguments.pairs)
    shares = {name: efficiency(len(table), tokens) for name, table in made.items()}
    print(
        f"ours {statistics.median(left):,.0f} sequences/s at {shares['ours']:.4f} efficiency, "
        f"TRL {statistics.median(right):,.0f} at {shares['trl']:.4f}"
    )
    packed = made["ours"]["seq_lengths"].combine_chunks().flatten().to_pylist()
    assert sorted(packed) == sorted(pc.list_value_length(column).to_pylist()), "sequences were lost"
    if shares["ours"] < EFFICIENCY:
        raise SystemExit(f"efficiency {shares['ours']:.4f} is below {EFFICIENCY}")
    report(
        "packing",
        [a / b for a, b in zip(left, right, strict=True)],
        goal=GOAL,
        better="higher",
        aa=control(left),
        efficiency=round(shares["ours"], 4),
        trl_efficiency=round(shares["trl"], 4),
    )


if __name__ == "__main__":
    main()
