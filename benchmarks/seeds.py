"""Does asynchrony cost learning? Held-out accuracy of the quickstart by GRPO, async ÷ sync, seed by seed.

One SFT start, then for every seed three runs of `recipes/quickstart/grpo.yaml` through the whole system:

    sync         max_staleness 0
    async        max_staleness 4, the default correction (the ratio is against the sampler)
    uncorrected  max_staleness 4, proximal recompute, correction none: what is stale is trained as if new

The ratio is the mean over seeds of async over that of sync; `spread` is the largest minus the smallest sync
accuracy, `uncorrected` the third mode's accuracies. What counts is that async lies within the seeds' spread
of sync. Not a timing: the machine may be busy. About 20 minutes.

    python -m benchmarks.seeds [--seeds 3] [--steps 60] [--lr 2e-4] [--staleness 4]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._report import report
from hpc_rl.telemetry.metrics import read_metrics, series

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "recipes" / "quickstart"
RUN_LIMIT_S = 1200.0
GOAL = 0.98
MODES = {
    "sync": ["algorithm.max_staleness=0"],
    "async": ["algorithm.max_staleness={staleness}"],
    "uncorrected": [
        "algorithm.max_staleness={staleness}",
        "algorithm.proximal=recompute",
        "algorithm.correction={{kind: none}}",
    ],
}


def run(recipe: Path, overrides: list[str]) -> Path:
    """Submit here, wait for the end, and give the run directory."""
    hpc_rl = [sys.executable, "-m", "hpc_rl.cli.main"]
    command = [*hpc_rl, "submit", str(recipe), *overrides, "cluster.placement=local", "--site", "local"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"seeds: {' '.join(command)} failed:\n{done.stderr}")
    run_dir = Path(json.loads(done.stdout)["run_dir"])
    deadline = time.monotonic() + RUN_LIMIT_S
    while time.monotonic() < deadline:
        time.sleep(5)
        answer = subprocess.run(
            [*hpc_rl, "status", str(run_dir), "--json"], capture_output=True, text=True, check=True
        )
        state = json.loads(answer.stdout)
        if state["state"] == "COMPLETED":
            return run_dir
        if state["state"] in ("FAILED", "CANCELLED"):
            sys.exit(f"seeds: {run_dir} ended as {state['state']}: {state['first_cause']}")
    sys.exit(f"seeds: {run_dir} was not done after {RUN_LIMIT_S:.0f} s")


def prepare(folder: Path) -> list[str]:
    """Model, data and the SFT start; the overrides that the GRPO runs share."""
    task = folder / "task"
    make_model = [sys.executable, str(QUICKSTART / "make_model.py"), str(task)]
    subprocess.run(make_model, check=True, capture_output=True)
    runs = f"output_root={folder / 'runs'}"
    files = [f"model.path={task / 'model'}", f"data.train.path={task / 'train_sft.jsonl'}"]
    sft = run(QUICKSTART / "sft.yaml", [runs, *files])
    return [
        runs,
        f"model.path={sft / 'safetensors' / 'final'}",
        f"data.train.path={task / 'train.jsonl'}",
        f"data.eval.path={task / 'eval.jsonl'}",
        "checkpoint.enabled=false",
        "checkpoint.export=off",
    ]


def learn(shared: list[str], mode: str, seed: int, arguments: argparse.Namespace) -> float:
    """The held-out accuracy after the last step."""
    overrides = [text.format(staleness=arguments.staleness) for text in MODES[mode]]
    sizes = [f"policy.steps={arguments.steps}", f"policy.optimizer.lr={arguments.lr}", "eval.every=20"]
    run_dir = run(QUICKSTART / "grpo.yaml", [*shared, *sizes, *overrides, f"seed={seed}"])
    rows = read_metrics(run_dir / "metrics.jsonl")
    curve = series(rows, "eval/accuracy")
    stale = statistics.mean(value for _, value in series(rows, "rollout/staleness_mean"))
    words = " ".join(f"{value:.3f}" for _, value in curve)
    print(f"seed {seed} {mode:<12} accuracy {words}  staleness {stale:.2f}", flush=True)
    return curve[-1][1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--staleness", type=int, default=4)
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="hpc-rl-seeds-") as name:
        shared = prepare(Path(name))
        for seed in range(arguments.seeds):
            for mode in MODES:
                found[mode].append(learn(shared, mode, seed, arguments))
    ratios = [a / b for a, b in zip(found["async"], found["sync"], strict=True)]
    spread = max(found["sync"]) - min(found["sync"])
    within = abs(statistics.mean(found["async"]) - statistics.mean(found["sync"])) <= max(spread, 0.01)
    accuracies = {mode: [round(value, 4) for value in values] for mode, values in found.items()}
    facts = {"spread": round(spread, 4), "within_spread": within, **accuracies}
    report("seeds", ratios, goal=GOAL, better="higher", aa=1.0, **facts)


if __name__ == "__main__":
    main()
