"""What a push of weights costs: `python -m benchmarks.weight_sync`.

Four results, each with a JSON line; the last one printed is the wire's.

- `wire`: bytes per second of a push's frames over those of a plain `dist.broadcast` of the same tensors, one
  by one, in a gloo group of the same two processes, warm: the transport without packing and checking.
- `end_to_end`: the same for a whole push: gathered, packed, sent, checked tensor by tensor, copied into a
  model's weights and confirmed.
- `pause` (needs vLLM; `--parts` chooses): how long generation stands still for a push into a real vLLM engine
  that is generating, over vLLM's own pause, `reload_weights` from page-cached files, and resume.
- `delta`: bytes of a push of what changed over those of all, descriptions included, after each of the first
  AdamW steps at lr 3e-6 on weights of std 0.02 (random gradients; the first step, without a warm-up, moves
  every weight by lr). Bytes, not seconds: it has no control.

`--megabytes` and `--pairs` make a shorter run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks._report import interleave, report
from hpc_rl.bus.server import RedisServer
from hpc_rl.weights.buffers import BufferPool
from hpc_rl.weights.gloo import GlooTransport
from hpc_rl.weights.mirror import Mirror
from hpc_rl.weights.protocol import END, Frame, agree, pack_bucket, receive_frame, send_frame
from hpc_rl.weights.receiver import Receiver
from hpc_rl.weights.sender import group_prefix

BUCKET_BYTES = 64 << 20
LIMIT_S = 60.0
RAW, WIRE, PUSH, DONE = range(4)
PARTS = ["delta", "pause", "wire"]
Bucket = list[tuple[str, torch.Tensor]]


def layers(nbytes: int, width: int = 1024) -> Iterator[Bucket]:
    """bf16 tensors of decoder layers of a model of `nbytes`, layer by layer."""
    shapes = {
        "q_proj": (width, width),
        "k_proj": (width // 2, width),
        "v_proj": (width // 2, width),
        "o_proj": (width, width),
        "gate_proj": (3 * width, width),
        "up_proj": (3 * width, width),
        "down_proj": (width, 3 * width),
        "norm": (width,),
    }
    number, total = 0, 0
    while total < nbytes:
        layer = [
            (f"layers.{number}.{name}.weight", (torch.randn(shape) * 0.02).bfloat16())
            for name, shape in shapes.items()
        ]
        total += sum(tensor.nbytes for _, tensor in layer)
        number += 1
        yield layer


class Source:
    """Whole layers, as many to a bucket as fit."""

    def __init__(self, nbytes: int) -> None:
        self.layers = list(layers(nbytes))

    @property
    def tensors(self) -> Bucket:
        return [item for layer in self.layers for item in layer]

    def buckets(self, max_bytes: int) -> Iterator[Bucket]:
        bucket: Bucket = []
        for layer in self.layers:
            size = sum(tensor.nbytes for _, tensor in bucket + layer)
            if bucket and size > max_bytes:
                yield bucket
                bucket = []
            bucket = bucket + layer
        yield bucket


def command(what: int) -> int:
    """What rank 0 wants to be done next; both begin at the same time."""
    number = torch.tensor([what])
    dist.broadcast(number, 0)
    dist.barrier()
    return int(number)


def join(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT_S))


def receiver(folder: str, nbytes: int) -> None:
    """The replica: has the weights of its model, and receives as it is told."""
    join(folder, 1)
    model = {name: torch.zeros_like(tensor) for layer in layers(nbytes) for name, tensor in layer}
    channel: Any = None
    version = 0
    while (what := command(0)) != DONE:
        if what == RAW:
            for tensor in model.values():
                dist.broadcast(tensor, 0)
        if what == WIRE:
            deadline = time.monotonic() + LIMIT_S
            while receive_frame(channel, deadline).meta:
                pass
            agree(channel, True, deadline)
        if what == PUSH:
            if channel is None:
                channel = GlooTransport.join(
                    f"{folder}/bus/bus.json", group_prefix(1, 0, 0, 1), 0, 1, LIMIT_S
                )
            version += 1
            deadline = time.monotonic() + LIMIT_S
            receipt = Receiver(channel, model)
            for bucket in receipt.receive(version, deadline):
                for name, tensor in bucket:
                    model[name].copy_(tensor)
            receipt.finish(True, deadline)
        dist.barrier()
    dist.destroy_process_group()


class Policy:
    """Rank 0 of the transfers; each method is one round trip, in seconds."""

    def __init__(self, folder: str, nbytes: int, bucket_bytes: int) -> None:
        self.source = Source(nbytes)
        self.nbytes = sum(tensor.nbytes for _, tensor in self.source.tensors)
        bus_file = f"{folder}/bus/bus.json"
        self.sender = GlooTransport.sender(
            bus_file, attempt=1, workers=1, bucket_bytes=bucket_bytes, timeout_s=LIMIT_S
        )
        pool = BufferPool(torch.device("cpu"))
        buckets = self.source.buckets(bucket_bytes)
        self.frames = [pack_bucket(0, index, bucket, pool) for index, bucket in enumerate(buckets)]
        self.channel: Any = None
        self.version = 0

    def raw(self) -> float:
        command(RAW)
        began = time.perf_counter()
        for _, tensor in self.source.tensors:
            dist.broadcast(tensor, 0)
        return self._ended(began)

    def push(self) -> float:
        self.version += 1
        command(PUSH)
        began = time.perf_counter()
        result = self.sender.push(self.version, self.source, [0], [0])
        assert not result.failed, result.failed
        return self._ended(began)

    def wire(self) -> float:
        """The frames of a push that is packed already, over the transfer group of the pushes."""
        channel = self.sender._lanes[0].channel
        assert channel is not None, "a push comes first"
        command(WIRE)
        began = time.perf_counter()
        for frame in [*self.frames, Frame(END, b"", torch.empty(0, dtype=torch.uint8))]:
            send_frame(channel, frame, LIMIT_S)
        assert agree(channel, True, time.monotonic() + LIMIT_S) == 0
        return self._ended(began)

    @staticmethod
    def _ended(began: float) -> float:
        dist.barrier()
        return time.perf_counter() - began


def transfers(folder: str, megabytes: int, pairs: int, bucket_bytes: int) -> None:
    """The two results between two processes."""
    nbytes = megabytes * 10**6
    other = mp.get_context("spawn").Process(target=receiver, args=(folder, nbytes), daemon=True)
    other.start()
    join(folder, 0)
    policy = Policy(folder, nbytes, bucket_bytes)
    print(
        f"{policy.nbytes / 1e6:.0f} MB in {len(policy.source.tensors)} tensors, {len(policy.frames)} buckets"
    )
    for warm in (policy.push, policy.wire, policy.raw) * 2:
        warm()
    for name, ours, goal in (("end_to_end", policy.push, 0.6), ("wire", policy.wire, 0.9)):
        same = interleave(policy.raw, policy.raw, pairs, say=lambda line: None)
        left, right = interleave(ours, policy.raw, pairs)
        report(
            f"weight_sync.{name}",
            [raw / own for own, raw in zip(left, right, strict=True)],
            goal=goal,
            better="higher",
            aa=statistics.median(a / b for a, b in zip(*same, strict=True)),
            gigabytes_per_s=round(policy.nbytes / statistics.median(left) / 1e9, 2),
            raw_gigabytes_per_s=round(policy.nbytes / statistics.median(right) / 1e9, 2),
        )
    command(DONE)
    dist.destroy_process_group()
    other.join(LIMIT_S)


class FileSource:
    """The tensors of a model folder, decoder layers whole."""

    def __init__(self, folder: str) -> None:
        from safetensors.torch import load_file

        units: dict[str, Bucket] = {}
        for name, tensor in sorted(load_file(f"{folder}/model.safetensors").items()):
            unit = ".".join(name.split(".")[:3]) if ".layers." in name else name
            units.setdefault(unit, []).append((name, tensor.clone()))
        self.layers = list(units.values())

    buckets = Source.buckets


def push_server(folder: str, turns: Any) -> None:
    """The policy of the pause benchmark: pushes the model's weights whenever `turns` gives a version."""
    torch.set_num_threads(1)
    source = FileSource(f"{folder}/model")
    sender = GlooTransport.sender(
        f"{folder}/bus/bus.json",
        attempt=1,
        workers=1,
        bucket_bytes=BUCKET_BYTES,
        timeout_s=LIMIT_S,
        keep=True,
    )
    while version := turns.get():
        assert not sender.push(version, source, [0], [0]).failed
    sender.close()


class Generating:
    """A vLLM engine that never has nothing to do; `push` and `reload` are seconds of standstill."""

    def __init__(self, folder: str) -> None:
        from benchmarks import rollout
        from hpc_rl.rollout.engine import EngineSettings, TransferSettings
        from hpc_rl.rollout.engines.config import VllmOptions
        from hpc_rl.rollout.engines.vllm import VllmEngine, set_environment

        self.model = f"{folder}/model"
        self.parameters = rollout.make_model(Path(self.model))
        self.rollout = rollout
        self.turns: Any = mp.get_context("spawn").Queue()
        self.server = mp.get_context("spawn").Process(
            target=push_server, args=(folder, self.turns), daemon=True
        )
        self.server.start()
        bus_file = Path(folder) / "bus" / "bus.json"
        transfer = TransferSettings(bus_file, attempt=1, replica=0, incarnation=0, keep=True)
        settings = EngineSettings(
            model=self.model,
            options=VllmOptions(extra={"skip_tokenizer_init": True}),
            dtype="float32",
            max_model_len=1024,
            transfer=transfer,
        )
        set_environment(settings.options)
        self.runner = asyncio.Runner()
        self.engine = VllmEngine(settings)
        self.runner.run(self.engine.start())
        self.version = 0

    def push(self) -> float:
        return self.runner.run(self._while_generating(self._push))

    def reload(self) -> float:
        return self.runner.run(self._while_generating(self._reload))

    async def _while_generating(self, change: Callable[[], Awaitable[float]]) -> float:
        prompt = self.rollout.prompts()[0]
        name = f"busy-{time.monotonic_ns()}"
        request = asyncio.create_task(self.engine.generate(prompt, self.rollout.sampling(0, 900), 4, name))
        await asyncio.sleep(0.5)
        seconds = await change()
        await self.engine.abort(name)
        await request
        return seconds

    async def _push(self) -> float:
        self.version += 1
        self.turns.put(self.version)
        await self.engine.fetch_weights(self.version, LIMIT_S)
        began = time.perf_counter()
        await self.engine.pause()
        await self.engine.receive_weights(self.version, LIMIT_S)
        await self.engine.resume()
        return time.perf_counter() - began

    async def _reload(self) -> float:
        llm = self.engine._llm
        began = time.perf_counter()
        await llm.pause_generation(mode="keep", clear_cache=True)
        await llm.collective_rpc("reload_weights", kwargs={"weights_path": self.model})
        await llm.resume_generation()
        return time.perf_counter() - began

    def close(self) -> None:
        self.turns.put(0)
        self.runner.run(self.engine.close())
        self.runner.close()
        self.server.join(LIMIT_S)


def pause(folder: str, pairs: int) -> None:
    """The result with vLLM."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    engine = Generating(folder)
    try:
        print(f"{engine.parameters / 1e6:.1f} M parameters in fp32, 4 requests under way")
        for warm in (engine.push, engine.reload) * 2:
            warm()
        same = interleave(engine.reload, engine.reload, pairs, say=lambda line: None)
        left, right = interleave(engine.push, engine.reload, pairs)
    finally:
        engine.close()
    report(
        "weight_sync.pause",
        [own / raw for own, raw in zip(left, right, strict=True)],
        goal=1.2,
        better="lower",
        aa=statistics.median(a / b for a, b in zip(*same, strict=True)),
        ours_s=round(statistics.median(left), 4),
        raw_s=round(statistics.median(right), 4),
    )


class Trained:
    """fp32 weights of decoder layers under AdamW; a source of them in bf16."""

    def __init__(self, nbytes: int) -> None:
        torch.manual_seed(0)
        self.weights = {
            name: torch.nn.Parameter(tensor.float()) for layer in layers(nbytes) for name, tensor in layer
        }
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=3e-6, weight_decay=0.01)

    def step(self) -> None:
        for weight in self.weights.values():
            weight.grad = torch.randn_like(weight) * 1e-3
        self.optimizer.step()

    def bucket(self) -> Bucket:
        return [(name, weight.detach().bfloat16()) for name, weight in self.weights.items()]


def delta(megabytes: int, steps: int) -> None:
    """The result without a clock."""
    model, mirror = Trained(megabytes * 10**6), Mirror()
    mirror.put(0, model.bucket())
    ratios = []
    for step in range(steps):
        model.step()
        patches = mirror.put_changes(0, model.bucket())
        assert patches is not None
        whole = mirror.frame(step + 1, 0)
        change = mirror.change_frame(step + 1, step, 0, patches)
        sizes = [len(frame.meta) + frame.payload.numel() for frame in (change, whole)]
        ratios.append(sizes[0] / sizes[1])
        print(f"step {step + 1}/{steps}: {sizes[0] / 1e6:.2f} MB of {sizes[1] / 1e6:.2f} MB")
    report("weight_sync.delta", ratios, goal=0.1, better="lower", aa=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=320)
    parser.add_argument("--bucket-mb", type=int, default=BUCKET_BYTES >> 20)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder) / "redis")
        server.start()
        server.write_bus_file(Path(folder) / "bus" / "bus.json")
        try:
            if "delta" in options.parts:
                delta(min(options.megabytes, 64), options.pairs)
            if "pause" in options.parts:
                pause(folder, options.pairs)
            if "wire" in options.parts:
                transfers(folder, options.megabytes, options.pairs, options.bucket_mb << 20)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
