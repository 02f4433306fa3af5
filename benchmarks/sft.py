"""What an SFT step of ours costs, on a random Llama of about 5 million parameters in fp32:
`python -m benchmarks.sft [--pairs N] [--threads N] [--only bare,trainer,trl,packed]`.

- `bare`: over the loop that everyone writes (B4 x S256, AdamW fused, clip 1.0), step by step in turns in one
  process, after 10 steps of warm-up. Ours includes the data, the metrics and the checks of a real run.
  A second bare loop is the A/A control: the result is valid while that is within 1 +- 0.01.
- `trainer`, `trl`: over `transformers.Trainer` and `trl.SFTTrainer` on the same model and batch, in blocks of
  steps that alternate; each of their steps lasts from its begin to the next one's (callbacks), logging,
  evaluation and saving off.
- `packed`: tokens per second of lognormal lengths, packed (ours), over a bare loop that pads each batch.

One line of JSON each; the last is that of `bare`.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks._report import control, report
from benchmarks._sft_parts import Bare, Ours, make_rows, make_trainer, padded, save_model
from benchmarks._sft_peers import sft_trainer, step_seconds, transformers_trainer

BATCH, LENGTH, ROWS, WARM_UP = 4, 256, 64, 10
BLOCK, BLOCKS = 20, 6
GOAL, VALID = 1.02, 0.01


class Bench:
    """The model, the rows and our trainer; `fresh` makes them anew for each comparison."""

    def __init__(self, folder: Path, pairs: int) -> None:
        self.folder, self.pairs = folder, pairs
        self.model = folder / "model"
        self.parameters = save_model(self.model)
        self.rows = make_rows(folder / "rows.jsonl", [LENGTH] * ROWS)
        self.batches = [padded(self.rows[i : i + BATCH]) for i in range(0, ROWS, BATCH)]

    def ours(self, rows: str = "rows.jsonl", **policy: object) -> Ours:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        return Ours(make_trainer(folder, self.model, self.folder / rows, **policy))


def against_bare(bench: Bench) -> None:
    """Three sides in turns: ours, a bare loop, and another one for the control."""
    ours = bench.ours(batch_size=BATCH)
    sides = [ours, Bare(bench.model, bench.batches), Bare(bench.model, bench.batches)]
    for _ in range(WARM_UP):
        losses = [side.step() and side.loss for side in sides]
        assert max(losses) - min(losses) < 1e-4, f"the sides do not train the same: {losses}"
    seconds: list[list[float]] = [[], [], []]
    for turn in range(bench.pairs):
        for offset in range(3):
            side = (turn + offset) % 3
            seconds[side].append(sides[side].step())
    ratios = [a / b for a, b in zip(seconds[0], seconds[1], strict=True)]
    aa = statistics.median(a / b for a, b in zip(seconds[2], seconds[1], strict=True))
    parts = {name.removeprefix("time/"): round(1e3 * value, 2) for name, value in ours.metrics.items()
             if name.startswith("time/")}  # fmt: skip
    report(
        "sft_bare", ratios, goal=GOAL, better="lower", aa=aa, valid=abs(aa - 1) <= VALID,
        ours_ms=round(1e3 * statistics.median(seconds[0]), 1),
        bare_ms=round(1e3 * statistics.median(seconds[1]), 1),
        parameters=bench.parameters, parts_of_the_last_step_ms=parts,
    )  # fmt: skip
    ours.close()


def against_peer(
    bench: Bench, name: str, make: Callable[[Path, Path, list[list[int]], int, int], object]
) -> None:
    """Blocks of our steps and of the peer's in turns; each block's median against its neighbour's."""
    ours = bench.ours(batch_size=BATCH)
    for _ in range(WARM_UP):
        ours.step()
    mine, theirs = [], []
    for block in range(BLOCKS):
        trainer = make(bench.folder / f"{name}_{block}", bench.model, bench.rows, BATCH, BLOCK + WARM_UP)
        theirs.append(statistics.median(step_seconds(trainer)[WARM_UP:]))
        mine.append(statistics.median(ours.step() for _ in range(BLOCK)))
        print(f"{name} block {block + 1}/{BLOCKS}: ours {mine[-1]:.4f}, {name} {theirs[-1]:.4f} s")
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    ms = round(1e3 * statistics.median(theirs), 1)
    report(f"sft_{name}", ratios, goal=1.0, better="lower", aa=control(theirs), theirs_ms=ms)
    ours.close()


def packed_against_padded(bench: Bench) -> None:
    """Tokens per second of the same rows, those of a batch packed into one row or padded to the longest."""
    generator = random.Random(0)
    lengths = [min(512, max(8, round(generator.lognormvariate(4.6, 0.8)))) for _ in range(ROWS)]
    rows = make_rows(bench.folder / "lognormal.jsonl", lengths)
    size = 8
    batches = [padded(rows[i : i + size]) for i in range(0, ROWS, size)]
    tokens = [sum(map(len, rows[i : i + size])) for i in range(0, ROWS, size)]
    ours = bench.ours("lognormal.jsonl", batch_size=size, micro_batch_tokens=4096)
    bare = Bare(bench.model, batches)
    for _ in range(len(batches)):
        ours.step(), bare.step()
    packed, unpacked = [], []
    for turn in range(max(2, bench.pairs // 10) * len(batches)):
        batch = turn % len(batches)
        packed.append(tokens[batch] / ours.step())
        unpacked.append(tokens[batch] / bare.step())
    ratios = [a / b for a, b in zip(packed, unpacked, strict=True)]
    count = sum(batch.numel() for batch in batches)
    report(
        "sft_packed", ratios, goal=1.0, better="higher", aa=control(unpacked[:: len(batches)]),
        packed_tokens_per_s=round(statistics.median(packed)),
        padded_tokens_per_s=round(statistics.median(unpacked)),
        real_share_of_padded=round(sum(tokens) / count, 3),
    )  # fmt: skip
    ours.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="packed,trl,trainer,bare")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    wanted = options.only.split(",")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.pairs)
        print(f"{bench.parameters / 1e6:.1f} M parameters, B{BATCH} x S{LENGTH}, {options.threads} threads")
        if "packed" in wanted:
            packed_against_padded(bench)
        if "trl" in wanted:
            against_peer(bench, "trl", sft_trainer)
        if "trainer" in wanted:
            against_peer(bench, "trainer", transformers_trainer)
        if "bare" in wanted:
            against_bare(bench)


if __name__ == "__main__":
    main()
