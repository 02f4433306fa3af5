"""The controller under 1,000 replicas and 10,000 rollouts a second of 8 KiB, in groups of 8.

The real controller process with the real Redis: admission, ledger, metrics and a snapshot every five steps.
The replicas and the policy are processes that only speak (`_load_parts.py`). Measured over all but the first
ten seconds: CPU seconds of the controller process over wall clock (the ratio), its memory then and at the
end, and how long a freed place of a replica waits for its next prompt.
Goals: at most 0.6 core, memory flat, 99 % of the waits below 100 ms.

`--tokens` is how many of a rollout's 8 KiB are tokens with log-probs (12 bytes each); the rest is text.

    python -m benchmarks.controller_load [--seconds 60] [--replicas 1000] [--rate 10000] [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._load_parts import GROUP_SIZE, policy, replicas
from benchmarks._report import report
from hpc_rl.bus.server import RedisServer
from hpc_rl.plan.schema import Mesh, Plan
from hpc_rl.recipe.dump import dump_resolved
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir

ROOT = Path(__file__).resolve().parent.parent
NBYTES = 8192
SLOTS = 4
WARM_S = 10.0
GROUPS_PER_STEP = 1024


def make_run(folder: Path, count: int, steps: int) -> RunDir:
    run = RunDir.create(folder, "load")
    data = run.root / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": str(i)}) + "\n" for i in range(10_000)))
    recipe = Recipe.model_validate(
        {
            "name": "load",
            "kind": "rl",
            "model": {"path": "none"},
            "data": {"train": {"path": str(data)}},
            "algorithm": {"name": "grpo", "group_size": GROUP_SIZE, "max_staleness": 8},
            "reward": [{"name": "exact"}],
            "policy": {
                "batch_size": GROUPS_PER_STEP * GROUP_SIZE,
                "steps": steps,
                "micro_batch_tokens": 65536,
            },
            "rollout": {"replicas": count, "max_in_flight": SLOTS},
            "checkpoint": {"save_every": 5, "max_keep": 1, "export": "off"},
            "eval": {"every": 0, "before": False},
            "logging": {"wandb": {"mode": "off"}},
        }
    )
    run.resolved.write_text(dump_resolved(recipe))
    plan = Plan(
        name="load", kind="rl", placement="local", site="none", time_minutes=60, groups=[], mesh=Mesh(),
        site_profile={"name": "none", "placement": "local"},
    )  # fmt: skip
    run.plan.write_text(plan.model_dump_json())
    run.open_logs(1)
    return run


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def measure(pid: int, result: Path, seconds: float) -> dict[str, float]:
    """From the moment that prompts flow."""
    deadline = time.monotonic() + 120
    while not result.exists() or json.loads(result.read_text())["history"][-1][1] < GROUPS_PER_STEP:
        if time.monotonic() > deadline:
            sys.exit("controller_load: no prompt groups came back within two minutes")
        time.sleep(0.2)
    time.sleep(WARM_S)
    started, cpu, memory = time.perf_counter(), cpu_seconds(pid), memory_mb(pid)
    most = memory
    while time.perf_counter() - started < seconds - WARM_S:
        time.sleep(1.0)
        most = max(most, memory_mb(pid))
    wall, used = time.perf_counter() - started, cpu_seconds(pid) - cpu
    time.sleep(3.0)  # the replicas write every two seconds
    found = json.loads(result.read_text())
    waits = sorted(wait for at, wait in found["waits"] if started <= at <= started + wall)
    inside = [(at, done) for at, done in found["history"] if started <= at <= started + wall]
    rate = (inside[-1][1] - inside[0][1]) * GROUP_SIZE / (inside[-1][0] - inside[0][0])
    return {
        "core": used / wall,
        "us_per_group": 1e6 * used / wall / rate * GROUP_SIZE,
        "rollouts_per_s": rate,
        "hand_out_p50_ms": 1000 * waits[len(waits) // 2],
        "hand_out_p99_ms": 1000 * waits[int(len(waits) * 0.99)],
        "memory_10s_mb": memory,
        "memory_most_mb": most,
        "memory_end_mb": memory_mb(pid),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--rate", type=int, default=10_000, help="rollouts per second")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--profile", type=Path, help="write a cProfile of the controller to this file")
    arguments = parser.parse_args()
    mean_s = arguments.replicas * SLOTS * GROUP_SIZE / arguments.rate
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="hpc-rl-load-") as name:
        folder = Path(name)
        run = make_run(folder, arguments.replicas, steps=100_000)
        server = RedisServer(folder / "redis")
        server.start()
        bus_file, result = run.bus_file(1), folder / "measured.json"
        server.write_bus_file(bus_file)
        profile = ["-m", "cProfile", "-o", str(arguments.profile)] if arguments.profile else []
        command = [sys.executable, *profile, "-m", "hpc_rl.controller", str(run.root), "--attempt", "1"]
        with (folder / "controller.log").open("wb") as log:
            controller = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        sizes = (arguments.replicas, mean_s, arguments.tokens, NBYTES)
        others = [
            context.Process(target=replicas, args=(str(bus_file), str(result), *sizes), daemon=True),
            context.Process(target=policy, args=(str(run.root), str(bus_file), 0.05), daemon=True),
        ]
        try:
            for process in others:
                process.start()
            found = measure(controller.pid, result, arguments.seconds)
            rows = run.metrics.read_text().splitlines() if run.metrics.exists() else []
            if not rows:
                sys.exit("controller_load: not one step was done")
            found["steps"] = len(rows)
            found["policy_idle"] = json.loads(rows[-1])["time/policy_idle"]
        finally:
            controller.terminate()
            controller.wait(30)
            for process in others:
                process.kill()
                process.join()
            server.stop()
            print((folder / "controller.log").read_text()[-1500:], file=sys.stderr)
    facts = {key: round(value, 3) for key, value in found.items()} | {"tokens": arguments.tokens}
    report("controller_load", [found["core"]], goal=0.6, better="lower", aa=1.0, **facts)


if __name__ == "__main__":
    main()
