"""Async RL step ÷ max(policy alone, rollout alone): what the control plane costs when compute is only waits.

Real supervisor, controller, Redis, bus, roles and scorers; trainer and engine wait lognormal times (at
least 20 ms) instead of computing (`paced_plugin.py`). The halves alone are bare loops over the same waits:
the policy's one after the other, the rollouts' with as many at once as the engine has slots.
Goal: at most 1.10.

A step waits for its slowest prompt, and that prompt could start at most `max_staleness` steps earlier: where
it takes longer than these steps, no control plane can hide it. `schedule` is what is lost to that alone
(the same waits and the same bound, played through with a control plane that costs nothing, over the same
maximum); `ratio / schedule` is ours.

    python -m benchmarks.paced [--steps 200] [--pairs 3] [--staleness 4]
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks._report import control, report
from hpc_rl.controller.prompts import prompt_seed

ROOT = Path(__file__).resolve().parent.parent
PROMPTS_PER_STEP, GROUP_SIZE = 8, 4


def write_recipe(folder: Path, steps: int, staleness: int) -> Path:
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
        "policy": {"trainer": "paced", "batch_size": PROMPTS_PER_STEP * GROUP_SIZE, "steps": steps},
        "rollout": {
            "engine": "paced",
            "max_tokens": 48,
            "max_in_flight": 64,
            "weights": {"transport": "paced"},
        },
        "checkpoint": {"enabled": False, "export": "off"},
        "eval": {"every": 0, "before": False},
        "logging": {"wandb": {"mode": "off"}},
        "cluster": {"placement": "local"},
    }
    path = folder / "paced.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def run_async(recipe: Path, steps: int) -> float:
    """Seconds from the end of step 1 to the end of the last: loading does not count."""
    hpc_rl = [sys.executable, "-m", "hpc_rl.cli.main"]
    done = subprocess.run(
        [*hpc_rl, "submit", str(recipe), "--json"], capture_output=True, text=True, check=True
    )
    run_dir = Path(json.loads(done.stdout)["run_dir"])
    deadline = time.monotonic() + 60 + steps
    while time.monotonic() < deadline:
        status = subprocess.run(
            [*hpc_rl, "status", str(run_dir), "--json"], capture_output=True, text=True, check=True
        )
        state = json.loads(status.stdout)
        if state["state"] == "COMPLETED":
            break
        if state["state"] in ("FAILED", "CANCELLED"):
            sys.exit(f"paced: the run ended as {state['state']}: {state['first_cause']}")
        time.sleep(5)  # rarely: asking costs a Python start on the same two cores
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["time"] - rows[0]["time"]


def policy_alone(steps: int) -> float:
    from benchmarks.paced_plugin import PacedTrainerOptions, lognormal

    options = PacedTrainerOptions()
    started = time.perf_counter()
    for step in range(2, steps + 1):
        time.sleep(lognormal(step, options.mean_s, options.sigma))
    return time.perf_counter() - started


def rollout_alone(steps: int) -> float:
    from benchmarks.paced_plugin import PacedEngineOptions, lognormal

    options = PacedEngineOptions()

    async def generate(slots: asyncio.Semaphore, ordinal: int) -> None:
        async with slots:
            seed = prompt_seed(0, "train", ordinal)
            await asyncio.sleep(lognormal(seed, options.mean_s, options.sigma))

    async def everything() -> None:
        slots = asyncio.Semaphore(options.slots)
        ordinals = range(PROMPTS_PER_STEP, steps * PROMPTS_PER_STEP)
        await asyncio.gather(*(generate(slots, ordinal) for ordinal in ordinals))

    started = time.perf_counter()
    asyncio.run(everything())
    return time.perf_counter() - started


def schedule(steps: int, staleness: int) -> float:
    """Seconds from the end of step 1 to the end of the last, if messages and decisions took no time.

    Prompts start in order, each on the slot that is free first, and not before the version that
    `max_staleness` asks for; a step starts when the one before and all its prompts are done.
    """
    from benchmarks.paced_plugin import PacedEngineOptions, PacedTrainerOptions, lognormal

    trainer, engine = PacedTrainerOptions(), PacedEngineOptions()
    slots = [0.0] * engine.slots
    ends = [0.0]  # when version v is there
    for window in range(steps):
        admitted, ready = ends[max(0, window - staleness)], 0.0
        for ordinal in range(window * PROMPTS_PER_STEP, (window + 1) * PROMPTS_PER_STEP):
            seed = prompt_seed(0, "train", ordinal)
            end = max(admitted, heapq.heappop(slots)) + lognormal(seed, engine.mean_s, engine.sigma)
            heapq.heappush(slots, end)
            ready = max(ready, end)
        ends.append(max(ends[-1], ready) + lognormal(window + 1, trainer.mean_s, trainer.sigma))
    return ends[-1] - ends[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=4)
    arguments = parser.parse_args()
    steps, staleness = arguments.steps, arguments.staleness
    with tempfile.TemporaryDirectory(prefix="hpc-rl-paced-") as name:
        folder = Path(name)
        make_model = ROOT / "recipes" / "quickstart" / "make_model.py"
        subprocess.run(
            [sys.executable, str(make_model), str(folder / "task")], check=True, capture_output=True
        )
        recipe = write_recipe(folder, steps, staleness)
        ratios, whole, bounds = [], [], []
        for pair in range(arguments.pairs):
            policy, rollout = policy_alone(steps), rollout_alone(steps)
            whole.append(run_async(recipe, steps))
            ratios.append(whole[-1] / max(policy, rollout))
            bounds.append(schedule(steps, staleness) / max(policy, rollout))
            print(
                f"pair {pair + 1}: async {whole[-1]:.2f} s, policy alone {policy:.2f} s, rollout alone "
                f"{rollout:.2f} s, ratio {ratios[-1]:.3f}",
                flush=True,
            )
    facts = {"steps": steps, "staleness": staleness, "schedule": round(statistics.median(bounds), 4)}
    report("paced", ratios, goal=1.10, better="lower", aa=control(whole), **facts)


if __name__ == "__main__":
    main()
