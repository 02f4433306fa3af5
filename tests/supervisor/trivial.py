"""Runs of trivial roles: the real supervisor, Redis, bus and role processes, with nothing to train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_rl.plan.schema import Group, Mesh, Plan
from hpc_rl.recipe.dump import dump_resolved
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).parent / "programs"


def group(role: str, tasks: int, **fields: Any) -> Group:
    known = {
        "role": role,
        "component": None,
        "job_name": f"trivial:{role}",
        "nodes": 1,
        "tasks": tasks,
        "tasks_per_node": tasks,
        "cpus_per_task": 1,
        "gpus_per_task": 0,
        "gpus_per_node": 0,
    }
    return Group(**{**known, **fields})


def make_run(
    folder: Path,
    *,
    policy: int = 2,
    rollout: int = 2,
    groups: list[Group] | None = None,
    site: dict[str, Any] | None = None,
    **cluster: Any,
) -> RunDir:
    """A run directory as `submit` leaves it."""
    local = {"name": "test", "placement": "local", "paths": {"local": str(folder)}}
    run = RunDir.create(folder, "trivial")
    recipe = Recipe.model_validate(
        {
            "name": "trivial",
            "kind": "rl",
            "model": {"path": "none"},
            "data": {"train": {"path": "none"}},
            "cluster": cluster,
        }
    )
    plan = Plan(
        name="trivial",
        kind="rl",
        placement=cluster.get("placement", "local"),
        site="test",
        time_minutes=10,
        groups=groups or [group("policy", policy), *([group("rollout", rollout)] if rollout else [])],
        mesh=Mesh(dp_shard=policy),
        site_profile=site or local,
    )
    run.resolved.write_text(dump_resolved(recipe))
    run.plan.write_text(plan.model_dump_json())
    return run


def environment(**wanted: Any) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(PROGRAMS)])
    return {**os.environ, "PYTHONPATH": path, "TRIVIAL": json.dumps(wanted)}


class Supervised:
    """A supervisor started as `local` starts it, and what it leaves in the run directory."""

    def __init__(self, run: RunDir, env: dict[str, str]) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trivial_supervisor", str(run.root)],
            env=env,
            cwd=run.root,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, deadline_s: float = 60.0) -> int:
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running; logs:\n{self.logs()}") from None

    def logs(self) -> str:
        files = sorted(self.run.logs.glob("attempt_*/*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in files)

    def until(self, condition: Callable[[], Any], what: str, deadline_s: float = 30.0) -> Any:
        deadline = time.monotonic() + deadline_s
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited {deadline_s} s for {what}; logs:\n{self.logs()}"
            assert self.process.poll() is None, f"ended before {what}; logs:\n{self.logs()}"
            time.sleep(0.05)
        return value

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def processes_of(run: RunDir) -> list[int]:
    """Processes of this machine with the run's path on their command line, its Redis included."""
    marks = (str(run.root).encode(), f"hpc-rl-redis-{run.run_id}".encode())
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(mark in command for mark in marks):
            found.append(int(entry.name))
    return found
