"""Loading a sharded model over a plain read of the same bytes: `python -m benchmarks.load`.

Two gloo ranks load a random Qwen3 of 174M parameters into fp32 master weights under FSDP2:
    ours   fresh storage for the shards, ties and computed buffers made, `load_weights`
    peer   the same ranks `readinto` their half of the file into fresh memory
From a file of fp32 (697 MB: files and shards have as many bytes), which is the ratio of the line; and, under
`bf16`, from one of bfloat16, as models are published: there the peer reads its half piece by piece through a
buffer of 8 MiB and widens each into fresh fp32 memory. Warm: the file is in the page cache for both. How much
anonymous memory of a rank grows while the model is made and loaded is read from /proc/self/status and
compared with its shard.
"""

from __future__ import annotations

import ctypes
import gc
import io
import mmap
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.conversion_mapping import get_model_conversion_mapping

from benchmarks._report import report_seconds, summary
from benchmarks._sharded import RANKS, alternate, random_model, run_ranks, work_folder
from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf.folder import weight_files
from hpc_rl.models.hf.loading import load_weights, materialise
from hpc_rl.models.hf.model import skeleton
from hpc_rl.models.hf.sharding import shard
from hpc_rl.recipe.schema import Model

HIDDEN, LAYERS = 1024, 9
PAIRS = 12
GOAL = 1.5
BUFFER = 8 << 20
_LIBC = ctypes.CDLL(None)


class _Sides:
    """What one rank does for each side. Both begin and end together; rank 0's time counts."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.spec = Model(path=str(folder), dtype="float32")
        self.parallel = ParallelSpec(torch.device("cpu"), torch.float32, dp_shard=RANKS)
        self.files = weight_files(folder)
        (self.file,) = set(self.files.values())
        self.share = self.file.stat().st_size // RANKS // 2 * 2
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
        """Bytes as they are."""
        dist.barrier()
        began = time.perf_counter()
        memory = mmap.mmap(-1, self.share)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.rank * self.share)
            _read_into(file, memoryview(memory))
        dist.barrier()
        taken = time.perf_counter() - began
        memory.close()
        return taken

    def peer_wide(self) -> float:
        """Pairs of bytes as the fp32 numbers that they stand for."""
        dist.barrier()
        began = time.perf_counter()
        memory = mmap.mmap(-1, 2 * self.share)
        target = torch.frombuffer(memory, dtype=torch.float32)
        buffer = torch.empty(BUFFER // 2, dtype=torch.bfloat16)
        room = buffer.view(torch.uint8).numpy().data
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.rank * self.share)
            for piece in target.split(len(buffer)):
                _read_into(file, room[: 2 * len(piece)])
                piece.copy_(buffer[: len(piece)])
        dist.barrier()
        taken = time.perf_counter() - began
        del target, piece
        memory.close()
        return taken


def _read_into(file: io.FileIO, room: memoryview) -> None:
    while room:
        room = room[file.readinto(room) :]


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def _rank(rank: int, folder: str, pairs: int) -> dict[str, dict[str, Any]]:
    found = {}
    for dtype in ("fp32", "bf16"):
        sides = _Sides(rank, Path(folder) / dtype)
        peer = sides.peer if dtype == "fp32" else sides.peer_wide
        found[dtype] = {
            **alternate(rank, sides.ours, peer, pairs),
            "grown_mb": [round(min(sides.grown) / 1e6, 1), round(max(sides.grown) / 1e6, 1)],
            "shard_mb": round(sides.shard_bytes / 1e6, 1),
            "nbytes": sides.file.stat().st_size,
        }
    return found


def main(pairs: int = PAIRS) -> None:
    with work_folder(3_000_000_000) as folder:
        random_model(folder / "fp32", HIDDEN, LAYERS, torch.float32)
        random_model(folder / "bf16", HIDDEN, LAYERS, torch.bfloat16)
        found = run_ranks(_rank, folder, str(folder), pairs)
    fp32, bf16 = found["fp32"], found["bf16"]
    wide = summary(bf16.pop("ours"), bf16.pop("peer"))
    report_seconds("load", fp32.pop("ours"), fp32.pop("peer"), goal=GOAL, **fp32, bf16=wide | bf16)


if __name__ == "__main__":
    main()
