"""Export of a sharded model over DCP's own safetensors writer: `python -m benchmarks.export`.

Two gloo ranks hold a random Qwen3 of 143M parameters under FSDP2 and write it as 286 MB of bfloat16, warm:
    ours   stage (cast of the fp32 weights included), write in place, config, sync, rename
    peer   `dcp.save` with `HuggingFaceStorageWriter(save_distributed=True, enable_consolidation=True)` of
           tensors that are bfloat16 already, two output files, then fsync of the files as ours does
Both write new files to the same folder (in memory where there is room, so no disk is measured). The bytes
between ranks are counted (ours must be 0), and the stall is compared with a copy of the same bytes.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._report import report_seconds
from benchmarks._sharded import RANKS, alternate, random_model, run_ranks, work_folder
from hpc_rl.checkpoint.export import Export, Exporter
from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf.model import HfModel, build
from hpc_rl.recipe.schema import Model

HIDDEN, LAYERS = 1024, 7
PAIRS = 12
GOAL = 0.4


class _Transfers(TorchDispatchMode):
    """Counts the bytes of tensors that are given to collectives and point-to-point calls."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            flat = [value for arg in args for value in (arg if isinstance(arg, list) else [arg])]
            self.nbytes += sum(value.nbytes for value in flat if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))


class _Sides:
    """What one rank does for each side. Both are collectives; rank 0's time counts."""

    def __init__(self, rank: int, model: HfModel, folder: Path) -> None:
        self.rank, self.model, self.folder, self.runs = rank, model, folder, 0
        self.exporter = Exporter(rank, RANKS, "1.1")
        self.state = {
            name: parameter.detach().to(torch.bfloat16) for name, parameter in model.module.named_parameters()
        }
        self.stalls: list[float] = []
        self.copies: list[float] = []
        self.sent = 0

    def ours(self) -> float:
        target = self._target()
        dist.barrier()
        began = time.perf_counter()
        with _Transfers() as seen:
            export = self.exporter.stage(self.model, Export(target, self.model.folder, None, torch.bfloat16))
        self.stalls.append(time.perf_counter() - began)
        export.join(600.0)
        dist.barrier()
        taken = time.perf_counter() - began
        self.sent += seen.nbytes
        self._clear(target)
        return taken

    def peer(self) -> float:
        target = self._target()
        half = len(self.state) // 2
        files = {name: 1 + (number >= half) for number, name in enumerate(self.state)}
        dist.barrier()
        began = time.perf_counter()
        writer = HuggingFaceStorageWriter(
            str(target), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=True
        )
        dcp.save(self.state, storage_writer=writer)
        if self.rank == 0:
            _sync(target)
        dist.barrier()
        taken = time.perf_counter() - began
        self._clear(target)
        return taken

    def copy(self, source: list[Tensor], into: list[Tensor]) -> None:
        began = time.perf_counter()
        torch._foreach_copy_(into, source)
        self.copies.append(time.perf_counter() - began)

    def _target(self) -> Path:
        self.runs += 1
        return self.folder / f"export-{self.runs}"

    def _clear(self, target: Path) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(target)


def _sync(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _rank(rank: int, folder: str, pairs: int) -> dict[str, Any]:
    spec = Model(path=str(Path(folder) / "model"), dtype="bfloat16")
    shards = ParallelSpec(torch.device("cpu"), torch.bfloat16, dp_shard=RANKS)
    sides = _Sides(rank, build(spec, shards), Path(folder))
    seconds = alternate(rank, sides.ours, sides.peer, pairs)
    locals_ = [p.to_local() for p in sides.model.module.parameters() if isinstance(p, DTensor)]
    into = [torch.empty_like(local.detach(), dtype=torch.bfloat16) for local in locals_]
    for _ in range(6):
        sides.copy([local.detach() for local in locals_], into)
    return {
        **seconds,
        "stall": statistics.median(sides.stalls[1:]),  # the first makes the staging buffer
        "copy": statistics.median(sides.copies[1:]),
        "sent": sides.sent,
        "nbytes": sum(value.numel() * 2 for value in sides.state.values()),
    }


def main(pairs: int = PAIRS) -> None:
    with work_folder(3_000_000_000) as folder:
        random_model(folder / "model", HIDDEN, LAYERS)
        found = run_ranks(_rank, folder, str(folder), pairs)
        where = "memory" if folder.is_relative_to("/dev/shm") else "disk"
    report_seconds(
        "export",
        found["ours"],
        found["peer"],
        goal=GOAL,
        nbytes=found["nbytes"],
        stall_s=round(found["stall"], 4),
        copy_s=round(found["copy"], 4),
        bytes_between_ranks=found["sent"],
        files_in=where,
        fsync="both",
    )


if __name__ == "__main__":
    main()
