"""A trainer, an engine and a transport that wait instead of computing, for `benchmarks/paced.py`.

They come in through the public extension points (`plugins:` in the recipe), so controller, bus, Redis,
supervisor, role loops and scorers are the real ones. Waits are lognormal, at least 20 ms, and a function
of step or prompt, so that the halves alone can wait exactly as long.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from hpc_rl.bus.messages import CheckpointSaved, ModelExported, TrainStep
from hpc_rl.policy.trainer import TrainerContext
from hpc_rl.recipe.extensions import register
from hpc_rl.recipe.schema import Section
from hpc_rl.rollout.engine import EngineSettings, Sample, WeightReport
from hpc_rl.types import EngineLoad, Sampling, VersionSpan
from hpc_rl.weights.protocol import PushResult

FLOOR_S = 0.020
ANSWER_TOKENS = 48


class PacedTrainerOptions(Section):
    mean_s: float = Field(0.100, gt=0)
    sigma: float = 0.3


class PacedEngineOptions(Section):
    mean_s: float = Field(0.080, gt=0)
    sigma: float = 0.5
    slots: int = Field(8, ge=1)


def lognormal(seed: int, mean_s: float, sigma: float) -> float:
    """A lognormal wait with this mean, in seconds, at least `FLOOR_S`."""
    mu = math.log(mean_s) - sigma**2 / 2
    return max(FLOOR_S, random.Random(seed).lognormvariate(mu, sigma))


class PacedTrainer:
    """Waits where a trainer would compute."""

    def __init__(self, context: TrainerContext) -> None:
        self.options = PacedTrainerOptions(**context.recipe.policy.trainer_options)
        self.total_steps = context.recipe.policy.steps or 0

    def load(self) -> int:
        return 0

    def info(self) -> dict[str, str]:
        return {"total_steps": str(self.total_steps)}

    def train_step(self, command: TrainStep) -> dict[str, float]:
        time.sleep(lognormal(command.step, self.options.mean_s, self.options.sigma))
        return {"train/loss": 0.0}

    def source(self) -> Any:
        return None

    def stage_checkpoint(self, step: int, folder: Path, sync: bool) -> float:
        raise AssertionError("the benchmark saves nothing")

    def export(self, step: int, label: str, folder: Path) -> None:
        raise AssertionError("the benchmark exports nothing")

    def poll(self) -> Iterator[CheckpointSaved | ModelExported]:
        return iter(())

    finish = poll

    def close(self) -> None:
        return None


class PacedEngine:
    """`slots` prompt groups are under way at once; each takes its lognormal time."""

    def __init__(self, settings: EngineSettings) -> None:
        self.options: PacedEngineOptions = settings.options
        self.version, self.vocab_size = 0, 16
        self._slots = asyncio.Semaphore(self.options.slots)
        self._running, self._asked = 0, 0

    async def start(self) -> None:
        return None

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, count: int, request_id: str
    ) -> list[Sample]:
        self._asked += count
        try:
            async with self._slots:
                self._running += count
                try:
                    await asyncio.sleep(lognormal(sampling.seed, self.options.mean_s, self.options.sigma))
                finally:
                    self._running -= count
        finally:
            self._asked -= count
        tokens, spans = [5] * ANSWER_TOKENS, [VersionSpan(self.version, 0, ANSWER_TOKENS)]
        return [Sample(list(tokens), [-1.0] * ANSWER_TOKENS, list(spans), "length") for _ in range(count)]

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        return [-1.0] * (len(token_ids) - 1)

    def load(self) -> EngineLoad:
        return EngineLoad(running=self._running, waiting=self._asked - self._running)

    async def abort(self, request_id: str) -> None:
        return None

    async def fetch_weights(self, version: int, timeout_s: float) -> None:
        return None

    async def pause(self) -> None:
        return None

    async def receive_weights(self, version: int, timeout_s: float) -> WeightReport:
        self.version = version
        return WeightReport(version, 0, 0)

    async def resume(self) -> None:
        return None

    async def close(self) -> None:
        return None


class PacedSender:
    def push(
        self, version: int, source: Any, replicas: Sequence[int], incarnations: Sequence[int]
    ) -> PushResult:
        return PushResult(version)

    def start(
        self,
        version: int,
        source: Any,
        replicas: Sequence[int],
        incarnations: Sequence[int],
        done: Callable[[PushResult], None],
    ) -> None:
        done(PushResult(version))

    def check(self) -> None:
        return None

    wait = close = check

    def drop(self, replica: int) -> None:
        return None


class PacedTransport:
    @staticmethod
    def sender(bus_file: Path, **options: Any) -> PacedSender:
        return PacedSender()


register(
    "trainers", "paced", implementation="paced_plugin:PacedTrainer", config="paced_plugin:PacedTrainerOptions"
)
register(
    "engines", "paced", implementation="paced_plugin:PacedEngine", config="paced_plugin:PacedEngineOptions"
)
register("transports", "paced", implementation="paced_plugin:PacedTransport")
