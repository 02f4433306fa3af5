"""`supervised(run, ...)` starts a supervisor that is surely gone after the test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from trivial import Supervised, environment, processes_of

from hpc_rl.run.paths import RunDir


@pytest.fixture
def supervised() -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def start(run: RunDir, *, env: dict[str, str] | None = None, **wanted: Any) -> Supervised:
        one = Supervised(run, {**environment(**wanted), **(env or {})})
        started.append(one)
        return one

    yield start
    for one in started:
        one.close()
        import os
        import signal

        for pid in processes_of(one.run):
            os.kill(pid, signal.SIGKILL)
