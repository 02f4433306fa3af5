"""Role processes against a real Redis: registration, heartbeat, causes, SIGTERM, orphans, a lost bus."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.bus.client import Bus, Inbox
from hpc_rl.bus.server import RedisServer
from hpc_rl.plan.schema import Group, Mesh, Plan
from hpc_rl.recipe.dump import dump_resolved
from hpc_rl.recipe.schema import Recipe
from hpc_rl.roles import RoleProcess
from hpc_rl.run.paths import RunDir
from hpc_rl.run.process import start_ticks
from hpc_rl.run.secrets import store_secrets

pytestmark = pytest.mark.redis
ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path, "roles")
    recipe = {
        "name": "roles",
        "kind": "rl",
        "model": {"path": "none"},
        "data": {"train": {"path": "none"}},
        "plugins": ["helper.py"],
        "cluster": {"placement": "local", "secrets": ["ROLE_TOKEN"]},
    }
    run.resolved.write_text(dump_resolved(Recipe.model_validate(recipe)))
    (run.code / "helper.py").write_text(
        "import os\nGREETING = 'hello from ' + os.environ['ROLE_TOKEN'][:2]\n"
    )
    group = Group(
        role="policy",
        component=None,
        job_name="roles:policy",
        nodes=1,
        tasks=1,
        tasks_per_node=1,
        cpus_per_task=1,
        gpus_per_task=0,
        gpus_per_node=0,
    )
    plan = Plan(
        name="roles",
        kind="rl",
        placement="local",
        site="test",
        time_minutes=1,
        groups=[group],
        mesh=Mesh(),
        site_profile={"name": "test", "placement": "local"},
    )
    run.plan.write_text(plan.model_dump_json())
    store_secrets(run, ["ROLE_TOKEN"], {"ROLE_TOKEN": "hunter2hunter2"})
    run.open_logs(1)
    return run


@pytest.fixture
def server(run: RunDir, tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    server.write_bus_file(run.bus_file(1))
    yield server
    server.stop()


@pytest.fixture
def bus(server: RedisServer, run: RunDir) -> Iterator[Bus]:
    bus = Bus.connect(run.bus_file(1), 5.0)
    yield bus
    bus.close()


Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(run: RunDir) -> Iterator[Launch]:
    started: list[subprocess.Popen[str]] = []

    def start(
        body: str, *options: str, role: str = "policy", env: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        indented = "\n".join(f"    {line}" for line in body.strip().splitlines())
        code = (
            "import os, signal, subprocess, sys, time\nfrom hpc_rl.bus import messages as m\n"
            f"from hpc_rl.roles import main\ndef body(process):\n{indented}\nsys.exit(main({role!r}, body))\n"
        )
        one = subprocess.Popen(
            [sys.executable, "-c", code, str(run.root), "--attempt", "1", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        )
        started.append(one)
        return one

    yield start
    for one in started:
        try:
            os.killpg(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        one.communicate()


def until(look: Callable[[], Any], what: str, deadline_s: float = 20.0) -> Any:
    deadline = time.monotonic() + deadline_s
    while not (value := look()):
        assert time.monotonic() < deadline, f"waited {deadline_s} s for {what}"
        time.sleep(0.05)
    return value


def heard(bus: Bus, kind: type) -> Any:
    """The next message of `kind` to the controller."""
    box = Inbox(bus, m.inbox("controller"))
    return until(lambda: [x for x in box.poll(0.2) if isinstance(x, kind)], kind.__name__)[0]


def test_registration_inbox_and_heartbeat(bus: Bus, launch: Launch) -> None:
    body = """
import helper
process.register(greeting=helper.GREETING)
process.phase("step", limit_s=60)
process.step = 7
while not any(isinstance(message, m.Stop) for message in process.inbox.poll(1.0)):
    pass
with process.within("save"):
    return 5
"""
    role = launch(body, "--incarnation", "3", env={"SLURM_PROCID": "2", "SLURMD_NODENAME": "tr2"})
    told = heard(bus, m.Register)
    assert (told.role, told.index, told.incarnation, told.node, told.pid) == ("policy", 2, 3, "tr2", role.pid)
    assert told.info == {"greeting": "hello from hu"}  # the plugin was imported, after the secrets were set
    beat = until(lambda: (b := bus.heartbeats().get(("policy", 2), {})).get("step") == 7 and b, "a beat")
    assert (beat["phase"], beat["limit_s"], beat["pid"], beat["incarnation"]) == ("step", 60, role.pid, 3)
    assert abs(beat["time"] - time.time()) < 10
    bus.send(m.inbox("policy", 2), m.Stop("done"))
    assert role.wait(10) == 5


def test_the_phase_after_a_block_starts_anew(run: RunDir) -> None:
    process = RoleProcess(run, "policy", 0, 1)
    process.phase("idle", limit_s=60)
    start = process._payload()["phase_since"]
    with process.within("step"):
        time.sleep(0.02)
    beat = process._payload()
    assert (beat["phase"], beat["limit_s"]) == ("idle", 60)
    assert beat["phase_since"] >= start + 0.02


def test_a_later_incarnation_does_not_read_what_was_not_for_it(bus: Bus, launch: Launch) -> None:
    bus.send(m.inbox("rollout", 1), m.Stop("old"))
    body = """
process.register()
for message in process.inbox.poll(10.0):
    print("got", message.reason)
"""
    role = launch(body, "--replica", "1", "--incarnation", "2", role="rollout")
    heard(bus, m.Register)
    bus.send(m.inbox("rollout", 1), m.Stop("new"))
    output = role.communicate(timeout=20)[0]
    assert "got new" in output
    assert "got old" not in output


def test_a_failure_is_told_on_the_bus_and_on_disk(bus: Bus, launch: Launch, run: RunDir) -> None:
    body = """
process.phase("load")
raise ValueError(f"bad file, {os.environ['ROLE_TOKEN']}\\nmore")
"""
    role = launch(body, "--rank", "0", "--incarnation", "1")
    failed = heard(bus, m.RoleFailed)
    output = role.communicate(timeout=20)[0]
    assert role.returncode == 1
    assert (failed.cause, failed.phase, failed.exit_code) == ("ValueError: bad file, ***", "load", 1)
    assert "Traceback" in failed.detail
    on_disk = json.loads((run.attempt_logs(1) / "cause_policy_0.json").read_text())
    assert on_disk["cause"] == failed.cause
    assert "hunter2hunter2" not in output + failed.detail + str(on_disk)
    assert "failed in phase load" in output


def test_sigterm_flushes_for_a_bounded_time(bus: Bus, launch: Launch, run: RunDir) -> None:
    body = """
try:
    process.register()
    time.sleep(60)
finally:
    print("flushed", flush=True)
"""
    role = launch(body, "--rank", "0")
    heard(bus, m.Register)
    role.send_signal(signal.SIGTERM)
    output = role.communicate(timeout=5)[0]
    assert role.returncode == 143
    assert "flushed" in output
    assert not list(run.attempt_logs(1).glob("cause_*"))


def test_a_flush_that_hangs_is_cut(bus: Bus, launch: Launch) -> None:
    body = """
try:
    process.register()
    time.sleep(60)
finally:
    time.sleep(60)
"""
    role = launch(body, "--rank", "0")
    heard(bus, m.Register)
    start = time.monotonic()
    role.send_signal(signal.SIGTERM)
    assert role.wait(10) == 143
    assert time.monotonic() - start < 8


def test_sigusr1_dumps_the_stacks(bus: Bus, launch: Launch) -> None:
    role = launch("process.register()\ntime.sleep(5)", "--rank", "0")
    heard(bus, m.Register)
    role.send_signal(signal.SIGUSR1)
    output = role.communicate(timeout=20)[0]
    assert role.returncode == 0
    assert "in body" in output


def test_an_orphan_ends_with_its_children(bus: Bus, launch: Launch, run: RunDir) -> None:
    """The parent of the role dies without telling it; the heartbeat thread notices."""
    body = """
if os.fork():
    time.sleep(2)
    os._exit(0)
os.setsid()
from hpc_rl.roles import RoleProcess
again = RoleProcess(process.run_dir, "rollout", 4, 1)
with again:
    helper = subprocess.Popen(["sleep", "120"])
    again.register(helper=str(helper.pid))
    time.sleep(120)
"""
    launch(body, "--rank", "0")
    told = heard(bus, m.Register)
    helper = int(told.info["helper"])
    assert start_ticks(helper)
    until(lambda: start_ticks(helper) is None and start_ticks(told.pid) is None, "the orphan to end")
    cause = json.loads((run.attempt_logs(1) / "cause_rollout_4.json").read_text())
    assert "parent process" in cause["cause"]


@pytest.mark.slow
def test_a_lost_bus_ends_the_process(bus: Bus, server: RedisServer, launch: Launch, run: RunDir) -> None:
    role = launch("process.register()\ntime.sleep(120)", "--rank", "0")
    heard(bus, m.Register)
    server.kill()
    assert role.wait(45) == 74
    cause = json.loads((run.attempt_logs(1) / "cause_policy_0.json").read_text())
    assert f"Redis at 127.0.0.1:{server.port}" in cause["cause"]


def test_a_failure_before_the_bus_is_on_disk(run: RunDir, launch: Launch) -> None:
    run.resolved.unlink()
    role = launch("return 0", "--rank", "0")
    assert role.wait(20) == 1
    cause = json.loads((run.attempt_logs(1) / "cause_policy_0.json").read_text())
    assert "is not a run directory" in cause["cause"]


def test_the_index_must_be_known(launch: Launch) -> None:
    role = launch("return 0")
    output = role.communicate(timeout=20)[0]
    assert role.returncode == 2
    assert "--rank" in output
