"""Loading a sharded model over a plain read of the same bytes: `python -m benchmarks.load`.

Two gloo ranks load a random Qwen3 of 174M parameters (an fp32 file of 697 MB, so that files and shards have
as many bytes) under FSDP2:
    ours   fresh storage for the shards, ties and computed buffers made, `load_weights`
    peer   the same ranks `readinto` their half of the file into fresh memory
Warm: the file is in the page cache for both. How much anonymous memory of a rank grows while the model is
made and loaded is read from /proc/self/status and compared with its shard.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.conversion_mapping import get_model_conversion_mapping

from benchmarks._report import control, interleave, report
from benchmarks._sharded import RANKS, random_model, run_ranks, work_folder
from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf.folder import weight_files
from hpc_rl.models.hf.loading import load_weights, materialise
from hpc_rl.models.hf.model import skeleton
from hpc_rl.models.hf.sharding import shard
from hpc_rl.recipe.schema import Model

HIDDEN, LAYERS = 1024, 9
PAIRS = 12
GOAL = 1.5
_LIBC = ctypes.CDLL(None)


class _Sides:
    """What one rank does for each side. Both begin and end together; rank 0's time counts."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.spec = Model(path=str(folder), dtype="float32")
        self.parallel = ParallelSpec(torch.device("cpu"), torch.float32, dp_shard=RANKS)
        self.files = weight_files(folder)
        (self.file,) = set(self.files.values())
        self.grown: list[int] = []
        self.shard_bytes = 0

    def ours(self) -> float:
        module, _ = skeleton(self.spec)
        transforms = get_model_conversion_mapping(module)
        shard(module, self.parallel)
        gc.collect()
        _LIBC.malloc_trim(0)  # the memory of the run before goes back: ours is fresh, too
        before = anonymous_bytes()
        dist.barrier()
        began = time.perf_counter()
        materialise(module, self.parallel.device)
        load_weights(module, self.files, transforms)
        dist.barrier()
        taken = time.perf_counter() - began
        self.grown.append(anonymous_bytes() - before)
        self.shard_bytes = sum(p.to_local().nbytes for p in module.parameters())
        return taken

    def peer(self) -> float:
        size = self.file.stat().st_size
        share = size // RANKS
        dist.barrier()
        began = time.perf_counter()
        memory = mmap.mmap(-1, share)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.rank * share)
            read, view = 0, memoryview(memory)
            while read < share:
                read += file.readinto(view[read:])
        dist.barrier()
        taken = time.perf_counter() - began
        view.release()
        memory.close()
        return taken


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def _rank(rank: int, folder: str, pairs: int) -> dict[str, Any]:
    sides = _Sides(rank, Path(folder))
    sides.ours(), sides.peer()
    ours, peer = interleave(sides.ours, sides.peer, pairs, say=print if rank == 0 else _quiet)
    return {
        "ours": ours,
        "peer": peer,
        "grown": sides.grown,
        "shard": sides.shard_bytes,
        "nbytes": sides.file.stat().st_size,
    }


def _quiet(line: str) -> None:
    return None


def main(pairs: int = PAIRS) -> None:
    with work_folder(3_000_000_000) as folder:
        random_model(folder / "model", HIDDEN, LAYERS, torch.float32)
        found = run_ranks(_rank, folder, str(folder / "model"), pairs)
    report(
        "load",
        [a / b for a, b in zip(found["ours"], found["peer"], strict=True)],
        goal=GOAL,
        better="lower",
        aa=control(found["peer"]),
        nbytes=found["nbytes"],
        ours_s=round(statistics.median(found["ours"]), 4),
        peer_s=round(statistics.median(found["peer"]), 4),
        grown_mb=[round(min(found["grown"]) / 1e6, 1), round(max(found["grown"]) / 1e6, 1)],
        shard_mb=round(found["shard"] / 1e6, 1),
    )


if __name__ == "__main__":
    main()
