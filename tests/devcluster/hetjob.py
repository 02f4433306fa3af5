"""A hand-written heterogeneous job for tests of what Slurm does to a batch step and its `srun` steps."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpc_rl.cluster.devcluster import DevCluster

HERE = Path(__file__).resolve().parent


class HetJob:
    """Two components (policy: 2 tasks on 2 nodes, rollout: 1), each one step; see job_supervisor.py."""

    def __init__(self, cluster: DevCluster, folder: Path, *, python: str = sys.executable) -> None:
        self.cluster, self.folder, self.python = cluster, folder, python
        self.job_id = ""

    def submit(
        self,
        *,
        own_session: bool = True,
        exec_python: bool = True,
        obedient: bool = False,
        minutes: int = 10,
        options: tuple[str, ...] = (),
        srun: tuple[str, ...] = ("--kill-on-bad-exit=1",),
    ) -> HetJob:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({"groups": 2, "own_session": own_session, "obedient": obedient, "srun": srun})
        common = f"--time={minutes} --requeue --open-mode=append --output=" + str(self.folder / "batch.log")
        lines = [
            "#!/bin/bash",
            f"#SBATCH --partition=policy --nodes=2 --ntasks=2 --cpus-per-task=1 --mem=1G {common}",
            *(f"#SBATCH {option}" for option in options),
            "#SBATCH --job-name=t:policy",
            "#SBATCH hetjob",
            f"#SBATCH --partition=rollout --nodes=1 --ntasks=1 --cpus-per-task=1 --mem=1G {common}",
            *(f"#SBATCH {option}" for option in options),
            "#SBATCH --job-name=t:rollout",
            f"{'exec ' * exec_python}{self.python} -u {HERE}/job_supervisor.py {self.folder} '{settings}'",
            *([] if exec_python else ["code=$?", "echo python ended with $code", "exit $code"]),
        ]
        script = self.folder / "job.sbatch"
        script.write_text("\n".join(lines) + "\n")
        self.job_id = self.cluster.run("sbatch", "--parsable", str(script), cwd=self.folder).stdout.strip()
        return self

    def events(self, who: str = "", event: str = "") -> list[dict[str, Any]]:
        """Recorded events in order, those of one `who` (prefix) and kind only."""
        path = self.folder / "events.jsonl"
        if not path.exists():
            return []
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [e for e in lines if e["who"].startswith(who) and event in ("", e["event"])]

    def started(self, attempt: int = 1) -> HetJob:
        """Wait until all three tasks of this attempt run."""
        self.wait(
            lambda: len(self.events("task", "start")) >= 3 * attempt, f"3 tasks of attempt {attempt}", 60
        )
        return self

    def wait(self, ready: Callable[[], object], waiting_for: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                queue = self.cluster.run("squeue", "--states=all", check=False).stdout
                log = self.folder / "batch.log"
                text = log.read_text()[-1000:] if log.exists() else ""
                events = [{k: v for k, v in e.items() if k != "env"} for e in self.events()]
                raise TimeoutError(f"{waiting_for} within {seconds} s; {events}; {queue}; {text}")
            time.sleep(0.05)

    def states(self) -> list[str]:
        """The state of each component as squeue shows it (MinJobAge keeps ended ones for minutes)."""
        answer = self.cluster.run(
            "squeue", "--noheader", "--states=all", "-j", self.job_id, "-o", "%i %T", check=False
        )
        return [line.split()[1] for line in sorted(answer.stdout.splitlines())]

    def ended(self, seconds: float = 30) -> list[str]:
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        self.wait(lambda: self.states() and set(self.states()) <= final, f"job {self.job_id} to end", seconds)
        return self.states()

    def show(self, field: str) -> list[str]:
        """A field of `scontrol show job`, one value per component."""
        text = self.cluster.run("scontrol", "show", "job", self.job_id).stdout
        return [word.split("=", 1)[1] for word in text.split() if word.startswith(field + "=")]

    def tasks_alive(self) -> dict[str, bool]:
        return {e["who"]: alive(e["pid"]) for e in self.events("task", "start")}

    def poke_after_requeue(self) -> None:
        """Skip the wait of a requeued job, but not all of it: see docs/log.md, "StartTime=now"."""
        self.wait(lambda: set(self.states()) == {"PENDING"}, "both components to be pending")
        time.sleep(2)
        self.cluster.run("scontrol", "update", f"jobid={self.job_id}", "StartTime=now")

    def cancel(self) -> None:
        self.cluster.run("scancel", "--quiet", self.job_id, check=False)
        self.ended()

    def end_children(self) -> None:
        """End the stand-ins for Redis, which nothing but their supervisor ends."""
        for event in self.events("supervisor", "child"):
            if alive(event["child"]):
                kill9(event["child"])


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text[text.rindex(")") + 2] not in "ZX"


def kill9(pid: int) -> None:
    os.kill(pid, 9)
