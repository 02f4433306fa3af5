"""Async RL step ÷ max(policy alone, rollout alone): what the control plane costs when compute is only waits.

Real supervisor, controller, Redis, bus, roles and scorers; trainer and engine wait lognormal times (at
least 20 ms) instead of computing (`paced_plugin.py`). The halves alone are bare loops over the same waits:
the policy's one after the other, the rollouts' with as many at once as the engine has slots.
Goal: at most 1.05.

A prompt group that takes longer than `max_staleness` steps holds the policy up, whatever the control plane
does. `schedule` is what is lost to that alone (the same waits and the same admission, played through with a
control plane that costs nothing, over the same maximum); `ratio / schedule` is ours.

    python -m benchmarks.paced [--steps 200] [--pairs 3] [--staleness 4]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks._paced import Halves, make_task, policy_alone, rollout_alone, run, schedule, write_recipe
from benchmarks._paced import seconds as seconds_of
from benchmarks._report import control, report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--staleness", type=int, default=4)
    arguments = parser.parse_args()
    steps, staleness, halves = arguments.steps, arguments.staleness, Halves()
    with tempfile.TemporaryDirectory(prefix="hpc-rl-paced-") as name:
        folder = Path(name)
        make_task(folder)
        recipe = write_recipe(folder, halves, steps, staleness)
        ratios, whole, bounds = [], [], []
        for pair in range(arguments.pairs):
            policy, rollout = policy_alone(halves, steps), rollout_alone(halves, steps)
            rows = run(recipe, steps)
            whole.append(seconds_of(rows))
            ratios.append(whole[-1] / max(policy, rollout))
            bounds.append(schedule(halves, steps, staleness) / max(policy, rollout))
            print(
                f"pair {pair + 1}: async {whole[-1]:.2f} s, policy alone {policy:.2f} s, rollout alone "
                f"{rollout:.2f} s, ratio {ratios[-1]:.3f}",
                flush=True,
            )
        facts = {
            "steps": steps,
            "staleness": staleness,
            "schedule": round(statistics.median(bounds), 4),
            "staleness_mean": round(statistics.mean(row["rollout/staleness_mean"] for row in rows), 2),
            "policy_idle": round(statistics.mean(row["time/policy_idle"] for row in rows[1:]), 3),
            "in_flight_limit": rows[-1]["rollout/in_flight_limit"],
        }
    report("paced", ratios, goal=1.05, better="lower", aa=control(whole), **facts)


if __name__ == "__main__":
    main()
