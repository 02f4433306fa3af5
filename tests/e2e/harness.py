"""Drives the real command line as a user would, and waits with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FINAL = {"COMPLETED", "FAILED", "CANCELLED"}


def hpc_rl(*arguments: str | Path, env: dict[str, str] | None = None, timeout_s: float = 120) -> str:
    """Run `hpc-rl ...`; its stdout. A non-zero exit is an AssertionError with all it printed."""
    command = [sys.executable, "-m", "hpc_rl.cli.main", *map(str, arguments)]
    answer = subprocess.run(
        command,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert answer.returncode == 0, f"{command}\nexit {answer.returncode}\n{answer.stdout}\n{answer.stderr}"
    return answer.stdout


@dataclass
class Run:
    """A submitted run. `env` is the environment its commands need (SLURM_CONF of a devcluster)."""

    root: Path
    env: dict[str, str]
    awaited: int = 1  # entries in attempts.jsonl (two per attempt) before an end can be that of this attempt

    @classmethod
    def submit(cls, recipe: Path, *overrides: str, env: dict[str, str] | None = None) -> Run:
        answer = json.loads(hpc_rl("submit", recipe, *overrides, "--json", env=env))
        return cls(Path(answer["run_dir"]), env or {})

    def status(self) -> dict:
        return json.loads(hpc_rl("status", self.root, "--json", env=self.env))

    def ended(self) -> bool:
        """The latest attempt has written how it ended. Cheap: asking `status` costs a Python start."""
        attempts = read_jsonl(self.root / "attempts.jsonl")
        return bool(attempts) and attempts[-1]["end"] is not None and len(attempts) >= self.awaited

    def wait_for(self, what: Callable[[], bool], timeout_s: float, name: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            if self.ended() and not what():
                raise AssertionError(f"{name}: the run ended as {self.status()}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{name}: not within {timeout_s} s; {self.status()}\n{self.tail()}")
            time.sleep(0.2)

    def wait(self, timeout_s: float = 240) -> dict:
        """Until the run has ended; its status."""
        deadline = time.monotonic() + timeout_s
        asked = time.monotonic()
        while True:
            if self.ended() or time.monotonic() - asked > 10:  # rarely: what ended without a word
                asked = time.monotonic()
                if (status := self.status())["state"] in FINAL:
                    return status
            assert time.monotonic() < deadline, f"not ended within {timeout_s} s\n{self.tail()}"
            time.sleep(0.3)

    def complete(self, timeout_s: float = 240) -> dict:
        status = self.wait(timeout_s)
        assert status["state"] == "COMPLETED", f"{status}\n{self.tail()}"
        return status

    def wait_for_step(self, step: int, timeout_s: float = 180) -> None:
        self.wait_for(lambda: any(r["step"] >= step for r in self.metrics()), timeout_s, f"step {step}")

    def metrics(self) -> list[dict]:
        return read_jsonl(self.root / "metrics.jsonl")

    def ledger(self) -> list[dict]:
        return read_jsonl(self.root / "ledger" / "prompts.jsonl")

    def events(self, kind: str) -> list[dict]:
        return [event for event in read_jsonl(self.root / "events.jsonl") if event["kind"] == kind]

    def resume(self, *overrides: str) -> None:
        self.awaited = len(read_jsonl(self.root / "attempts.jsonl")) + 2
        hpc_rl("resume", self.root, *overrides, env=self.env)

    def cancel(self, *options: str) -> None:
        hpc_rl("cancel", self.root, *options, env=self.env)

    def tail(self, lines: int = 25) -> str:
        """The end of every log of the latest attempt, for messages."""
        parts = []
        for log in sorted((self.root / "logs" / "latest").glob("*")):
            if log.is_file():
                end = log.read_text(errors="replace").splitlines()[-lines:]
                parts.append(f"--- {log.name}\n" + "\n".join(end))
        return "\n".join(parts)


def read_jsonl(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
