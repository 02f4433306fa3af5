"""How long the parts of a step take, and what that is in tokens per second and of the device's peak."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from dataclasses import dataclass

import torch

from hpc_rl.catalog.flops import ModelFlops, model_flops
from hpc_rl.catalog.gpus import peak_flops
from hpc_rl.models.hf.model import HfModel


class StepTimer:
    """Seconds between marks, as `time/<name>_s`.

    A GPU works behind the host's back: there the marks are events in its stream, read once they have
    passed, so that nothing waits for them. What comes after the step's one wait (the optimizer) is then
    that of the step before. `data` is always the host's time: what the step waited for its batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._late: tuple[str, torch.cuda.Event, torch.cuda.Event] | None = None
        self._began = time.perf_counter()
        self._host: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event]] = []

    def begin(self) -> None:
        self._host, self._events, self._began = [], [], time.perf_counter()
        self._event("begin")

    def mark(self, name: str) -> None:
        """What went on since the last mark was `name`."""
        self._host.append((name, time.perf_counter()))
        self._event(name)

    def _event(self, name: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((name, event))

    def metrics(self) -> dict[str, float]:
        """After the last mark."""
        found: dict[str, float] = defaultdict(float)  # a step of several updates has its marks several times
        before = self._began
        for name, moment in self._host:
            if name == "data" or not self._cuda:
                found[f"time/{name}_s"] += moment - before
            before = moment
        if not self._cuda:
            return dict(found)
        self._events[-2][1].synchronize()  # of the mark after the step's wait: it has passed, or is about to
        if self._late is not None:
            name, start, end = self._late
            found[f"time/{name}_s"] += start.elapsed_time(end) / 1000
        for (_, start), (name, end) in zip(self._events[1:-2], self._events[2:-1], strict=True):
            found[f"time/{name}_s"] += start.elapsed_time(end) / 1000
        self._late = (self._events[-1][0], self._events[-2][1], self._events[-1][1])
        return dict(found)

    def seconds(self) -> float:
        """The host's time from `begin` to now."""
        return time.perf_counter() - self._began


@dataclass(frozen=True)
class Throughput:
    """`peak` is that of one device in FLOP/s; None: not known, or not in bf16."""

    flops: ModelFlops | None
    trained_share: float
    peak: float | None
    world_size: int

    def metrics(self, sums: dict[str, float], seconds: float) -> dict[str, float]:
        """Rates of a step whose totals over all ranks are `sums` (`step.Reduced`)."""
        seconds = max(seconds, 1e-9)
        found = {
            "train/tokens_per_s": sums["input_tokens"] / seconds,
            "train/samples_per_s": sums["sequences"] / seconds,
        }
        if self.flops is not None and self.peak is not None:
            work = self.flops.step(sums["input_tokens"], sums["tokens"], sums["squares"], self.trained_share)
            found["train/mfu"] = work / seconds / (self.peak * self.world_size)
        return found


def throughput_of(model: HfModel, device: torch.device, dtype: str, world_size: int) -> Throughput:
    config = json.loads((model.folder / "config.json").read_text(encoding="utf-8"))
    parameters = list(model.module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    share = trained / max(1, sum(p.numel() for p in parameters))
    known = device.type == "cuda" and dtype == "bfloat16"
    peak = peak_flops(torch.cuda.get_device_name(device)) if known else None
    return Throughput(model_flops(config), share, peak, world_size)
