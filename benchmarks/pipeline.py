"""Sync time ÷ async time of one run on the same paced halves: what overlapping generation and training gains.

Both train the same steps of the same size, hence the same tokens, with lognormal waits instead of compute
(`paced_plugin.py`); only `algorithm.max_staleness` differs: 0, or `--staleness`. R is what the rollouts of a
step take when a step's prompts begin together, T the policy's step, both measured alone by bare loops and
equal within 10 %; S is what a synchronous step takes beside the two: messages, scoring and the push.
Goals: at least 1.6, and at least 0.9 of the bound (R + T + S) / max(R, T) (`of_bound`).

    python -m benchmarks.pipeline [--steps 150] [--pairs 3] [--staleness 4]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks._paced import (
    PROMPTS_PER_STEP,
    Halves,
    make_task,
    policy_alone,
    rollout_alone,
    run,
    write_recipe,
)
from benchmarks._paced import seconds as seconds_of
from benchmarks._report import control, report

GOAL, OF_BOUND = 1.6, 0.9
# The slowest of eight prompts of a step takes 100 ms in the mean, as a step of the policy does.
HALVES = Halves(generate={"mean_s": 0.0515, "sigma": 0.5, "slots": PROMPTS_PER_STEP})


def tokens(rows: list[dict[str, float]]) -> float:
    return sum(row["rollout/tokens"] for row in rows)


def check_halves(steps: int) -> None:
    """As written, before the machine adds its noise."""
    size = PROMPTS_PER_STEP
    train = sum(HALVES.train_s(step) for step in range(2, steps + 1))
    slowest = [max(map(HALVES.generate_s, range(s * size, (s + 1) * size))) for s in range(1, steps)]
    if abs(sum(slowest) / train - 1) > 0.1:
        sys.exit(f"pipeline: the halves differ by more than 10 %: {sum(slowest):.2f} s and {train:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=4)
    arguments = parser.parse_args()
    steps = arguments.steps
    with tempfile.TemporaryDirectory(prefix="hpc-rl-pipeline-") as name:
        folder = Path(name)
        make_task(folder)
        recipes = [write_recipe(folder, HALVES, steps, staleness) for staleness in (0, arguments.staleness)]
        check_halves(steps)
        train = policy_alone(HALVES, steps)
        generate = rollout_alone(HALVES, steps, stepwise=True)
        ratios, shares, every = [], [], []
        for pair in range(arguments.pairs):
            sync, overlapped = run(recipes[0], steps), run(recipes[1], steps)
            if tokens(sync) != tokens(overlapped):
                sys.exit(f"pipeline: {tokens(sync):.0f} tokens against {tokens(overlapped):.0f}")
            assert max(row["rollout/staleness_max"] for row in sync) == 0
            every.append(seconds_of(overlapped))
            beside = max(0.0, seconds_of(sync) - generate - train)
            ratios.append(seconds_of(sync) / every[-1])
            shares.append(ratios[-1] / ((generate + train + beside) / max(generate, train)))
            print(
                f"pair {pair + 1}: sync {seconds_of(sync):.2f} s, async {every[-1]:.2f} s, ratio "
                f"{ratios[-1]:.3f}; R {generate:.2f} s, T {train:.2f} s, S {beside:.2f} s: "
                f"{shares[-1]:.3f} of the bound",
                flush=True,
            )
    facts = {
        "steps": steps,
        "of_bound": round(statistics.median(shares), 4),
        "of_bound_goal": OF_BOUND,
        "rollout_s": round(generate, 2),
        "policy_s": round(train, 2),
        "async_idle": round(statistics.mean(row["time/policy_idle"] for row in overlapped[1:]), 3),
        "sync_idle": round(statistics.mean(row["time/policy_idle"] for row in sync[1:]), 3),
    }
    report("pipeline", ratios, goal=GOAL, better="higher", aa=control(every), **facts)


if __name__ == "__main__":
    main()
