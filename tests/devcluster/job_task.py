"""One task of a step of the test job: records its start and every signal, beats ten times a second.

usage: job_task.py FOLDER GROUP [obedient]. An obedient task ends at SIGTERM; any task ends when
FOLDER/task<GROUP> holds an exit code.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

FOLDER, GROUP = Path(sys.argv[1]), sys.argv[2]
WHO = f"task{GROUP}.{os.environ['SLURM_PROCID']}"


def record(event: str, **fields: object) -> None:
    line = json.dumps({"time": time.time(), "who": WHO, "event": event, "pid": os.getpid(), **fields})
    with (FOLDER / "events.jsonl").open("a") as file:
        file.write(line + "\n")


def on_signal(number: int, _frame: object) -> None:
    record("signal", signal=signal.Signals(number).name)
    if number == signal.SIGTERM and "obedient" in sys.argv:
        sys.exit(143)


for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1):
    signal.signal(number, on_signal)
record("start", env={k: v for k, v in os.environ.items() if k.startswith(("SLURM", "CUDA"))})
while not (FOLDER / f"task{GROUP}").exists():
    (FOLDER / f"beat_{WHO}").write_text(str(time.time()))
    time.sleep(0.1)
code = int((FOLDER / f"task{GROUP}").read_text())
record("exit", code=code)
sys.exit(code)
