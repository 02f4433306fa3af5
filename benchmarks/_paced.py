"""A run whose trainer and engine only wait (`paced_plugin.py`), its halves alone, and what no control plane
can avoid: shared by `paced` and `pipeline`."""

from __future__ import annotations

import asyncio
import heapq
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpc_rl.controller.prompts import prompt_seed
from hpc_rl.controller.window import ORDERS, Flight
from hpc_rl.types import Prompt, PromptGroup

ROOT = Path(__file__).resolve().parent.parent
PROMPTS_PER_STEP, GROUP_SIZE = 8, 4


@dataclass(frozen=True)
class Halves:
    """What the two sides wait. Times are in seconds; `slots` prompt groups are generated at once."""

    train: dict[str, float] = field(default_factory=lambda: {"mean_s": 0.100, "sigma": 0.3})
    generate: dict[str, Any] = field(default_factory=lambda: {"mean_s": 0.080, "sigma": 0.5, "slots": 8})

    def train_s(self, step: int) -> float:
        from benchmarks.paced_plugin import lognormal

        return lognormal(step, self.train["mean_s"], self.train["sigma"])

    def generate_s(self, ordinal: int) -> float:
        from benchmarks.paced_plugin import lognormal

        return lognormal(prompt_seed(0, "train", ordinal), self.generate["mean_s"], self.generate["sigma"])


def make_task(folder: Path) -> None:
    """The quickstart's data and tokenizer."""
    make_model = ROOT / "recipes" / "quickstart" / "make_model.py"
    subprocess.run([sys.executable, str(make_model), str(folder / "task")], check=True, capture_output=True)


def write_recipe(folder: Path, halves: Halves, steps: int, staleness: int) -> Path:
    data = {"format": "prompt_answer", "prompt": "prompt", "answer": "answer", "chat": False}
    recipe = {
        "name": "paced",
        "kind": "rl",
        "output_root": str(folder / "runs"),
        "plugins": [str(ROOT / "benchmarks" / "paced_plugin.py")],
        "model": {"path": str(folder / "task" / "model"), "dtype": "float32"},
        "data": {"train": {"path": str(folder / "task" / "train.jsonl"), **data}},
        "algorithm": {"name": "grpo", "group_size": GROUP_SIZE, "max_staleness": staleness},
        "reward": [{"name": "exact"}],
        "policy": {
            "trainer": "paced",
            "trainer_options": halves.train,
            "batch_size": PROMPTS_PER_STEP * GROUP_SIZE,
            "steps": steps,
        },
        "rollout": {
            "engine": "paced",
            "engine_options": halves.generate,
            "max_tokens": 48,
            "weights": {"transport": "paced"},
        },
        "checkpoint": {"enabled": False, "export": "off"},
        "eval": {"every": 0, "before": False},
        "logging": {"wandb": {"mode": "off"}},
        "cluster": {"placement": "local"},
    }
    path = folder / f"paced-{staleness}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run(recipe: Path, steps: int) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of a whole run. Exits if it fails."""
    hpc_rl = [sys.executable, "-m", "hpc_rl.cli.main"]
    done = subprocess.run(
        [*hpc_rl, "submit", str(recipe), "--json"], capture_output=True, text=True, check=True
    )
    run_dir = Path(json.loads(done.stdout)["run_dir"])
    deadline = time.monotonic() + 60 + 2 * steps
    while time.monotonic() < deadline:
        status = subprocess.run(
            [*hpc_rl, "status", str(run_dir), "--json"], capture_output=True, text=True, check=True
        )
        state = json.loads(status.stdout)
        if state["state"] == "COMPLETED":
            return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        if state["state"] in ("FAILED", "CANCELLED"):
            sys.exit(f"paced: the run ended as {state['state']}: {state['first_cause']}")
        time.sleep(5)  # rarely: asking costs a Python start on the same two cores
    sys.exit(f"paced: {run_dir} has not ended in {60 + 2 * steps} s")


def seconds(rows: list[dict[str, Any]]) -> float:
    """From the end of step 1 to the end of the last: loading does not count."""
    return float(rows[-1]["time"] - rows[0]["time"])


def policy_alone(halves: Halves, steps: int) -> float:
    started = time.perf_counter()
    for step in range(2, steps + 1):
        time.sleep(halves.train_s(step))
    return time.perf_counter() - started


def rollout_alone(halves: Halves, steps: int, *, stepwise: bool = False) -> float:
    """All prompts but the first step's, with as many at once as the engine has slots; `stepwise`: those of a
    step begin when the step before is complete, as synchronous training has them."""

    async def generate(slots: asyncio.Semaphore, ordinal: int) -> None:
        async with slots:
            await asyncio.sleep(halves.generate_s(ordinal))

    async def everything() -> None:
        slots = asyncio.Semaphore(int(halves.generate["slots"]))
        size = PROMPTS_PER_STEP if stepwise else (steps - 1) * PROMPTS_PER_STEP
        for first in range(PROMPTS_PER_STEP, steps * PROMPTS_PER_STEP, size):
            await asyncio.gather(*(generate(slots, ordinal) for ordinal in range(first, first + size)))

    started = time.perf_counter()
    asyncio.run(everything())
    return time.perf_counter() - started


def schedule(halves: Halves, steps: int, staleness: int, order: str = "deadline") -> float:
    """Seconds from the end of step 1 to the end of the last, if messages and decisions took no time: the real
    window, played through with the same waits."""
    window = ORDERS[order](PROMPTS_PER_STEP, staleness, None, total_steps=steps)
    now, busy_until, version = 0.0, 0.0, 0
    flying: list[tuple[float, int]] = []
    ends: list[float] = []
    while not window.over or now < busy_until:
        while len(flying) < int(halves.generate["slots"]) and (ordinal := window.admit(version)) is not None:
            window.hand_out(ordinal, Flight(0, 1, version))
            heapq.heappush(flying, (now + halves.generate_s(ordinal), ordinal))
        if now >= busy_until and window.ready():
            step = window.reserve().step
            window.commit()
            busy_until = now + halves.train_s(step)
            ends.append(busy_until)
        now = min([*([busy_until] if now < busy_until else []), *(end for end, _ in flying[:1])])
        version = window.steps_taken if now >= busy_until else window.steps_taken - 1
        while flying and flying[0][0] <= now:
            _, ordinal = heapq.heappop(flying)
            group = PromptGroup(Prompt(ordinal, 0, ordinal, ""), [])
            window.finish(ordinal, window.in_flight[ordinal].owner, group)
    return ends[-1] - ends[0]
