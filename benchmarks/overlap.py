"""Async RL step with real vLLM and a real policy on one core each ÷ the slower half alone.

The whole is `benchmarks.grpo_step`'s run: supervisor, controller, Redis, one vLLM replica, one policy rank,
16 answers of 64 tokens a step, weights pushed every step. The halves alone are bare: the policy's forward,
backward and AdamW on the same sequences, and the engine generating the same groups with as many in flight,
each on one thread. Beside each half the other core multiplies matrices: the two cores share caches and
memory, and what they take from each other is not the system's doing. Goal: at most 1.15.

    python -m benchmarks.overlap [--steps 60] [--pairs 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks._report import control, report
from benchmarks.grpo_step import GROUP_SIZE, PROMPTS, TOKENS, WARM_UP, make_task, ours, write_recipe

ROOT = Path(__file__).resolve().parent.parent
GOAL = 1.15
STALENESS = 4
LIMIT_S = 900.0
PROMPT = "Say something about the number {:04d}: "


def policy_half(folder: Path, steps: int) -> float:
    """Seconds of a step: forward and backward of packed rows, clip, AdamW."""
    import torch
    from transformers import AutoTokenizer

    from hpc_rl.algorithms.config import GrpoConfig
    from hpc_rl.algorithms.grpo import Grpo
    from hpc_rl.controller.batch import BatchOptions, train_steps
    from hpc_rl.models.base import ParallelSpec
    from hpc_rl.models.hf.model import build
    from hpc_rl.policy.step import Ranks, StepRunner
    from hpc_rl.recipe.schema import Model
    from hpc_rl.types import TrainSample

    cpu = torch.device("cpu")
    model = build(Model(path=str(folder / "model"), dtype="float32"), ParallelSpec(cpu, torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    dice = torch.Generator().manual_seed(0)
    samples = []
    for number in range(PROMPTS * GROUP_SIZE):
        prompt = tokenizer(PROMPT.format(number // GROUP_SIZE))["input_ids"]
        answer = torch.randint(2, len(tokenizer), (TOKENS,), generator=dice).tolist()
        before = [0.0] * len(prompt)
        samples.append(
            TrainSample(
                ordinal=number // GROUP_SIZE,
                sample=number % GROUP_SIZE,
                token_ids=prompt + answer,
                loss_mask=[0] * len(prompt) + [1] * TOKENS,
                log_probs=before + [-8.0] * TOKENS,
                advantages=before + [1.0 if number % 2 else -1.0] * TOKENS,
            )
        )
    (command,) = train_steps(1, samples, BatchOptions(1, 1, 4096, None, "token_mean"))
    runner = StepRunner(model, Grpo(GrpoConfig()), Ranks(0, 1, 1, 1, cpu), sharded=False)
    parameters = list(model.module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    began = 0.0
    for step in range(steps):
        if step == WARM_UP:
            began = time.perf_counter()
        runner.forward_backward([part.samples for part in command.micro_batches], command.denominator)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - began) / (steps - WARM_UP)


def rollout_half(folder: Path, steps: int) -> float:
    """Seconds for the groups of a step, as many in flight as the staleness bound lets a run have."""
    from transformers import AutoTokenizer

    from hpc_rl.rollout.engine import EngineSettings
    from hpc_rl.rollout.engines.config import VllmOptions
    from hpc_rl.rollout.engines.vllm import VllmEngine, set_environment
    from hpc_rl.types import Sampling

    settings = EngineSettings(
        model=str(folder / "model"), options=VllmOptions(), dtype="float32", max_model_len=256
    )
    set_environment(settings.options)
    engine = VllmEngine(settings)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    slots = asyncio.Semaphore(PROMPTS * (STALENESS + 1))
    ends: list[float] = []

    async def group(number: int) -> None:
        async with slots:
            sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=TOKENS, seed=number * 1000)
            ids = tokenizer(PROMPT.format(number % 2000))["input_ids"]
            await engine.generate(ids, sampling, GROUP_SIZE, str(number))
            ends.append(time.perf_counter())

    async def everything() -> None:
        await engine.start()
        await asyncio.gather(*(group(number) for number in range(steps * PROMPTS)))
        await engine.close()

    asyncio.run(everything())
    first = WARM_UP * PROMPTS
    return (ends[-1] - ends[first - 1]) / (steps - WARM_UP)


def multiply() -> None:
    """The other core's load."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    while True:
        a = torch.tanh(a @ b * 0.01)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


@contextmanager
def loaded() -> Iterator[None]:
    """Inside, another process keeps one core busy."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.overlap", "--multiply"], cwd=ROOT, env=environment()
    )
    try:
        time.sleep(5)  # its imports
        assert process.poll() is None, "the load ended"
        yield
    finally:
        process.kill()
        process.wait()


def half(name: str, folder: Path, steps: int) -> float:
    command = [sys.executable, "-m", "benchmarks.overlap", "--half", name, "--folder", str(folder)]
    with loaded():
        done = subprocess.run(
            [*command, "--steps", str(steps)], cwd=ROOT, env=environment(), check=True, timeout=LIMIT_S,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--half", choices=["policy", "rollout"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--multiply", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = arguments.steps
    if arguments.multiply:
        multiply()
    if arguments.half is not None:
        run = policy_half if arguments.half == "policy" else rollout_half
        print(json.dumps(run(arguments.folder, steps)))
        return
    with tempfile.TemporaryDirectory(prefix="hpc-rl-overlap-") as name:
        folder = Path(name)
        make_task(folder)
        recipe = write_recipe(folder, steps, staleness=STALENESS)
        ratios, wholes = [], []
        for pair in range(arguments.pairs):
            policy, rollout = half("policy", folder, steps), half("rollout", folder, steps)
            wholes.append(statistics.mean(ours(recipe)[WARM_UP:]))
            ratios.append(wholes[-1] / max(policy, rollout))
            print(
                f"pair {pair + 1}: whole {wholes[-1]:.3f} s, policy alone {policy:.3f} s, rollout alone "
                f"{rollout:.3f} s, ratio {ratios[-1]:.3f}",
                flush=True,
            )
        facts = {"steps": steps, "policy_s": round(policy, 4), "rollout_s": round(rollout, 4)}
        report("overlap", ratios, goal=GOAL, better="lower", aa=control(wholes), **facts)


if __name__ == "__main__":
    main()
