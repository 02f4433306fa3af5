"""What test jobs run in place of the supervisor: it starts real steps, records signals, requeues itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hpc_rl.cluster.environment import role_environment, step_environment
from hpc_rl.cluster.slurm import watcher
from hpc_rl.cluster.slurm.steps import step_argv
from hpc_rl.plan import Site, read_plan
from hpc_rl.recipe.schema import Recipe

# What a role step sees, as one line of its log.
PROBE = (
    'echo "$SLURM_PROCID|$SLURMD_NODENAME|$SLURM_NTASKS|$CUDA_VISIBLE_DEVICES|$(date +%s)|$PWD|'
    '$TRITON_CACHE_DIR|${HF_TOKEN:-none}|${WANDB_API_KEY:-none}"; sleep 300'
)


def supervise(run_dir: str) -> int:
    """Start a step for the policy and for every replica, then wait for a signal. USR2 requeues."""
    root = Path(run_dir)
    signals: list[int] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    _say(root, "started", pid=os.getpid(), restart=restart, argv=sys.argv, secret="HF_TOKEN" in os.environ)
    children = _start_steps(root)
    while not signals:
        time.sleep(0.05)
        codes = [child.poll() for child in children]
        if codes and all(code is not None for code in codes):
            _say(root, "steps_ended", codes=codes)
            return max(abs(code or 0) for code in codes)
    _say(root, "signal", name=signal.Signals(signals[0]).name)
    if signals[0] == signal.SIGUSR2:
        watcher.requeue(os.environ["SLURM_JOB_ID"])
    time.sleep(60)  # Slurm ends us: a requeue and a cancel both send SIGTERM, then SIGKILL
    return 0


def fail(run_dir: str) -> int:
    """Ends the job with exit code 7, as a failed run does."""
    return 7


def _start_steps(root: Path) -> list[subprocess.Popen[bytes]]:
    plan = read_plan(root / "plan.json")
    site = Site.model_validate(plan.site_profile)
    recipe = Recipe.model_validate_json((root / "recipe.json").read_text(encoding="utf-8"))
    children = []
    for group in plan.groups:
        if group.role == "controller":
            continue
        variables = role_environment(plan, site, recipe, group.role)
        env = step_environment(os.environ, variables, secrets=recipe.cluster.secrets)
        for index in [0] if group.role == "policy" else range(group.tasks):
            name = "policy_%t" if group.role == "policy" else f"{group.role}_{index}"
            argv = step_argv(
                plan, site, group.role, index, ["bash", "-c", PROBE], root / f"{name}.log", run_dir=root
            )
            children.append(subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL))
    return children


def _say(root: Path, event: str, **fields: Any) -> None:
    with (root / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": event, "time": time.time(), **fields}) + "\n")
