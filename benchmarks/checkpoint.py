"""What a save costs training: `python -m benchmarks.checkpoint [--saves N] [--folder PATH]`.

One process trains a 141M-parameter fp32 model with AdamW (1.7 GB per save) on all cores, and saves on and off
with ours (`Saver`, its writer process, and COMPLETE as the controller writes it) and with
`dcp.async_save(async_checkpointer_type=PROCESS, async_stager=DefaultStager(shared memory, no pinning))`, both
to the same disk with every file synced. For each save:

- stall: how long the call that starts it blocks;
- lost step-seconds: stall plus, for each step until COMPLETE, its time minus the median of the
  undisturbed steps just before;
- time to COMPLETE: from the call until the checkpoint counts. Ours is finished between steps, as in a run.

Ratios are taken pair by pair, in alternating order. The stall is compared with a copy of the same tensors
into preallocated, warm memory (minus the 10 ms that the goal allows for everything else).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
)

from benchmarks._report import control, report
from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.checkpoint.saver import Saver

HIDDEN, LAYERS, VOCABULARY, TOKENS = 768, 14, 54_000, 64
QUIET_STEPS, SETTLE_STEPS = 5, 2
ALLOWED_S = 0.010
SAVES = 10


@dataclass
class Cost:
    """Seconds of one save."""

    stall: float
    lost: float
    complete: float


class Training:
    """The model, its optimizer and a step; `state` is what is saved."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(HIDDEN, 12, 4 * HIDDEN, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.module = nn.ModuleDict({"embedding": self.embedding, "blocks": self.blocks})
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-5, fused=True)
        self.batch = torch.randint(VOCABULARY, (1, TOKENS))
        self.step()
        self.state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            self.state[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                self.state[f"optim.{name}.{key}"] = value
        self.nbytes = sum(tensor.nbytes for tensor in self.state.values())
        self._copy = [torch.zeros_like(tensor) for tensor in self.state.values()]

    def step(self) -> float:
        began = time.perf_counter()
        output = self.blocks(self.embedding(self.batch))
        loss = nn.functional.cross_entropy((output @ self.embedding.weight.T)[0], self.batch[0])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    def memcpy(self) -> float:
        """Seconds to copy the state into memory that is there."""
        began = time.perf_counter()
        for target, tensor in zip(self._copy, self.state.values(), strict=True):
            target.copy_(tensor)
        return time.perf_counter() - began


class Ours:
    def __init__(self, training: Training) -> None:
        self.training, self.saver = training, Saver(0, 1, "benchmark")
        self.saver.prepare(training.nbytes + 16384 * len(training.state))
        self.folder = Path()

    def start(self, folder: Path) -> None:
        self.folder = folder
        self.saver.stage(1, folder / "policy", self.training.state)

    def complete(self) -> bool:
        for result in self.saver.poll():
            assert not result.error, result.error
            write_complete(self.folder)
            return True
        return False

    def ended(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        self.saver.close()


class Peer:
    """DCP's asynchronous save in a process of its own, with its staging kept between saves."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.stager = DefaultStager(StagingOptions(False, True, False, False))
        self._future: Future[Any] | None = None
        self._ended = 0.0

    def start(self, folder: Path) -> None:
        answer = async_save(
            self.training.state,
            storage_writer=FileSystemWriter(folder, sync_files=True),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            async_stager=self.stager,
        )
        future = answer.upload_completion if isinstance(answer, AsyncSaveResponse) else answer
        future.add_done_callback(self._note)
        self._future = future

    def _note(self, _: object) -> None:
        self._ended = time.perf_counter()

    def complete(self) -> bool:
        assert self._future is not None
        if not self._future.done():
            return False
        self._future.result()
        return True

    def ended(self) -> float:
        return self._ended

    def close(self) -> None:
        self.stager.close()


def measure(side: Ours | Peer, training: Training, folder: Path) -> Cost:
    """One save, from an undisturbed machine to COMPLETE."""
    for _ in range(SETTLE_STEPS):
        training.step()
    usual = statistics.median(training.step() for _ in range(QUIET_STEPS))
    target = folder / "step_00000001"
    began = time.perf_counter()
    side.start(target)
    stall = time.perf_counter() - began
    lost, done = stall, False
    while not done:
        before = time.perf_counter()
        training.step()
        done = side.complete()
        lost += time.perf_counter() - before - usual
    complete = side.ended() - began
    shutil.rmtree(target)
    return Cost(stall, lost, complete)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=SAVES, help="saves of each side")
    parser.add_argument("--folder", type=Path, default=None, help="on which disk (a temporary folder)")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    training = Training()
    print(f"{training.nbytes / 1e9:.2f} GB per save, {torch.get_num_threads()} threads", flush=True)
    sides: tuple[Ours, Peer] = (Ours(training), Peer(training))
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    copies: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for side in sides:  # the first save of a process makes its staging, and imports torch: not measured
            measure(side, training, Path(name))
        for pair in range(options.saves):
            for which in (0, 1) if pair % 2 == 0 else (1, 0):
                costs[which].append(measure(sides[which], training, Path(name)))
            copies.append(statistics.median(training.memcpy() for _ in range(3)))
            say(pair, options.saves, costs, copies)
    for side in sides:
        side.close()
    dist.destroy_process_group()
    summarize(costs, copies, training.nbytes)


def say(pair: int, pairs: int, costs: tuple[list[Cost], list[Cost]], copies: list[float]) -> None:
    words = [
        f"stall {c.stall:.3f} lost {c.lost:.2f} complete {c.complete:.2f} s"
        for c in (costs[0][-1], costs[1][-1])
    ]
    print(
        f"pair {pair + 1}/{pairs}: ours {words[0]}; DCP {words[1]}; memcpy {copies[-1]:.3f} s",
        flush=True,
    )


def summarize(costs: tuple[list[Cost], list[Cost]], copies: list[float], nbytes: int) -> None:
    """Three lines of JSON, the lost step-seconds last."""
    ours, peer = costs

    def pairs(of: Callable[[Cost], float]) -> list[float]:
        return [of(a) / of(b) for a, b in zip(ours, peer, strict=True)]

    def middle(side: list[Cost], of: Callable[[Cost], float]) -> float:
        return round(statistics.median(map(of, side)), 3)

    stalls = [max(0.0, cost.stall - ALLOWED_S) / copy for cost, copy in zip(ours, copies, strict=True)]
    aa = control([cost.complete for cost in peer])
    report("checkpoint_stall", stalls, goal=1.2, better="lower", aa=control(copies),
           ours_s=middle(ours, lambda c: c.stall), memcpy_s=round(statistics.median(copies), 3))  # fmt: skip
    report("checkpoint_complete", pairs(lambda c: c.complete), goal=1.5, better="lower", aa=aa,
           ours_s=middle(ours, lambda c: c.complete), peer_s=middle(peer, lambda c: c.complete))  # fmt: skip
    report("checkpoint_lost", pairs(lambda c: c.lost), goal=0.7, better="lower",
           aa=control([cost.lost for cost in peer]), gigabytes=round(nbytes / 1e9, 2),
           ours_s=middle(ours, lambda c: c.lost), peer_s=middle(peer, lambda c: c.lost))  # fmt: skip


if __name__ == "__main__":
    main()
