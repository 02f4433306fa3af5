"""A replica that was given up: when its next incarnation starts, and what is said of the old one."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc_rl.bus.messages import StartRole, StepExited, StepStarted, StopRole
from hpc_rl.run.events import EventLog, read_events
from hpc_rl.run.paths import RunDir
from hpc_rl.supervisor.attempt import AttemptLoop
from hpc_rl.supervisor.redis import KeptRedis


class FakeStep:
    """A step that ends when its `code` is set."""

    def __init__(self, role: str, index: int, incarnation: int) -> None:
        self.role, self.index, self.incarnation = role, index, incarnation
        self.argv: list[str] = []
        self.logs: list[Path] = []
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None: ...

    def kill(self) -> None:
        self.code = 137


class World:
    """An attempt's loop without Redis and processes."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir.create(folder, "lost")
        self.run.open_logs(1)
        self.started: list[FakeStep] = []
        unused: Any = SimpleNamespace()
        self.loop = AttemptLoop(
            self.run,
            1,
            redis=unused,
            launcher=SimpleNamespace(start=self.start),
            controller=[],
            controller_env={},
            secrets=[],
            signals=unused,
            lock=unused,
            events=EventLog(self.run, 1),
            warning_s=1.0,
            term_grace_s=1.0,
            on_term=lambda: None,
        )
        bus: Any = SimpleNamespace(set_value=lambda key, value: None)
        self.loop._bus = bus

    def start(self, role: str, index: int, incarnation: int) -> FakeStep:
        self.started.append(FakeStep(role, index, incarnation))
        return self.started[-1]

    def lose(self, grace_s: float) -> FakeStep:
        """The controller has given up replica 1, and wants it again."""
        self.loop._obey(StartRole("rollout", 1, 1))
        self.loop._obey(StopRole("rollout", 1, grace_s, "lost: Connection closed by peer", lost=True))
        self.loop._obey(StartRole("rollout", 1, 2))
        return self.started[0]

    def failures(self) -> list[str]:
        return [event["cause"] for event in read_events(self.run) if event["kind"] == "failure"]


def test_the_next_incarnation_waits_for_the_end_of_the_old_one(tmp_path: Path) -> None:
    world = World(tmp_path)
    old = world.lose(60.0)
    world.loop._look_at_steps()
    assert world.started == [old]
    old.code = 143
    world.loop._look_at_steps()
    assert [step.incarnation for step in world.started] == [1, 2]
    kinds = [(type(message), getattr(message, "incarnation", 0)) for message in world.loop._outbox]
    assert kinds == [(StepStarted, 1), (StepExited, 1), (StepStarted, 2)]
    assert world.failures() == []


def test_a_stop_takes_the_waiting_start_back(tmp_path: Path) -> None:
    world = World(tmp_path)
    old = world.lose(60.0)
    world.loop._obey(StopRole("rollout", 1, 5.0, "the run ends"))
    old.code = 0
    world.loop._look_at_steps()
    assert world.started == [old]


@pytest.mark.parametrize(
    ("grace_s", "failures"), [(60.0, ["ended with signal 9 (SIGKILL)"]), (-1.0, [])], ids=["its own", "ours"]
)
def test_a_kill_that_was_not_ours_is_a_cause(tmp_path: Path, grace_s: float, failures: list[str]) -> None:
    world = World(tmp_path)
    world.lose(grace_s).code = 137
    world.loop._look_at_steps()
    assert world.failures() == failures


def test_a_restart_of_redis_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir.create(tmp_path, "redis")
    redis = KeptRedis(run, 1, EventLog(run, 1), ["127.0.0.1"], scratch=tmp_path, binary=None)
    server: Any = SimpleNamespace(restart=lambda wait: None, write_bus_file=lambda path: None, port=1, pid=2)
    redis._server = server
    with caplog.at_level(logging.WARNING):
        redis.mend("killed by signal 9")
    assert "Redis is restarted (1 of 3): killed by signal 9" in caplog.text
