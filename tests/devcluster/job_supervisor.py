"""The batch step of the test job: a small supervisor with one `srun --het-group` client per component.

usage: job_supervisor.py FOLDER OPTIONS_JSON. Every signal and exit becomes a line of FOLDER/events.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1])
OPTIONS = json.loads(sys.argv[2])


def record(event: str, **fields: object) -> None:
    line = json.dumps(
        {"time": time.time(), "who": "supervisor", "event": event, "pid": os.getpid(), **fields}
    )
    with (FOLDER / "events.jsonl").open("a") as file:
        file.write(line + "\n")


TERMINATED: list[int] = []
LINGER_S = 2.0  # an srun that ends at the same moment is still reported


def on_signal(number: int, _frame: object) -> None:
    record("signal", signal=signal.Signals(number).name)
    if number == signal.SIGTERM and OPTIONS["obedient"]:
        TERMINATED.append(number)


def main() -> int:
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1):
        signal.signal(number, on_signal)
    record("start", env={k: v for k, v in os.environ.items() if k.startswith(("SLURM", "CUDA"))})
    # Stands for Redis: a child of the batch step in a session of its own.
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    record("child", child=child.pid)
    steps = {}
    for group in range(OPTIONS["groups"]):
        task = str(Path(__file__).with_name("job_task.py"))
        argv = [
            "srun",
            f"--het-group={group}",
            *OPTIONS["srun"],
            sys.executable,
            "-u",
            task,
            str(FOLDER),
            str(group),
        ]
        argv += ["obedient"] * OPTIONS["obedient"]
        log = (FOLDER / f"srun{group}.log").open("ab")
        steps[group] = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=OPTIONS["own_session"]
        )
        record("srun", group=group, srun=steps[group].pid)
    reported: set[int] = set()
    lingers: float | None = None
    while True:
        for group, step in steps.items():
            if group not in reported and step.poll() is not None:
                reported.add(group)
                record("step_exit", group=group, code=step.returncode)
        if (FOLDER / "requeue").exists():
            (FOLDER / "requeue").unlink()
            record(
                "requeue", code=subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]).returncode
            )
        if TERMINATED and lingers is None:
            lingers = time.monotonic() + LINGER_S
        if lingers is not None and (len(reported) == len(steps) or time.monotonic() > lingers):
            record("exit", code=143)
            child.kill()
            return 143
        if (FOLDER / "exit").exists():
            code = int((FOLDER / "exit").read_text())
            record("exit", code=code)
            child.kill()
            return code
        time.sleep(0.05)


sys.exit(main())
