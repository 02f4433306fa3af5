"""The policy process as the supervisor starts it: real Redis, real messages, real files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.bus.client import Bus, Inbox
from hpc_rl.bus.server import RedisServer
from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from tests.policy.sft_runs import with_eval
from tests.training import make_plan, make_recipe, make_run

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]


class Driver:
    """Plays the controller for one policy of `world_size` ranks."""

    def __init__(self, run: RunDir, attempt: int, redis: RedisServer, world_size: int = 1) -> None:
        redis.write_bus_file(run.bus_file(attempt))
        self.bus = Bus.connect(run.bus_file(attempt), 10.0)
        self.world_size = world_size
        for stream in ("controller", *("policy",) * world_size):
            self.bus.trim(m.inbox(stream), self.bus.end_of(m.inbox(stream)))
        self.inbox = Inbox(self.bus, m.inbox("controller"), cursor=self.bus.end_of(m.inbox("controller")))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [str(run.root), "--attempt", str(attempt), "--incarnation", "1", "--rank"]
        self.logs = [run.root / f"policy_{attempt}_{rank}.log" for rank in range(world_size)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "hpc_rl.policy", *arguments, str(rank)],
                env=env, cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(self.logs)
        ]  # fmt: skip
        self.seen: list[m.Message] = []

    def command(self, *messages: m.Message) -> None:
        for rank in range(self.world_size):
            self.bus.send(m.inbox("policy", rank), *messages)

    def wait(self, kind: type, count: int = 1, limit_s: float = 200.0) -> list:
        deadline = time.monotonic() + limit_s
        while len(found := [x for x in self.seen if isinstance(x, kind)]) < count:
            failed = [x for x in self.seen if isinstance(x, m.RoleFailed)]
            assert not failed or kind is m.RoleFailed, failed
            assert time.monotonic() < deadline, f"no {kind.__name__}; " + self.output()
            self.seen += self.inbox.poll(0.5)
        return found

    def output(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.bus.close()


@pytest.fixture
def prepared(tiny_model: Path, tmp_path: Path) -> tuple[Recipe, RunDir]:
    recipe = with_eval(make_recipe(tmp_path, tiny_model, steps=3))
    return recipe, make_run(tmp_path, recipe, make_plan(recipe))


def numbers(metrics: dict[str, float]) -> dict[str, float]:
    """All but what the clock says."""
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith("time/") and "_per_s" not in name
    }


def test_a_policy_process_trains_saves_exports_is_killed_and_resumes(
    prepared: tuple[Recipe, RunDir], redis_server: RedisServer
) -> None:
    _, run = prepared
    first = Driver(run, 1, redis_server)
    try:
        (ready,) = first.wait(m.PolicyReady)
        assert (ready.rank, ready.step, ready.info["total_steps"]) == (0, 0, "3")
        assert ready.info["eval_rows"] == "10"
        first.command(m.EvalLoss(0))
        (evaluated,) = first.wait(m.EvalDone)
        assert evaluated.step == 0
        assert 3 < evaluated.metrics["eval/loss"] < 6  # of a random model over 96 tokens
        first.command(m.TrainStep(1), m.TrainStep(2), m.SaveCheckpoint(2), m.ExportModel(2, "step_2"))
        steps = first.wait(m.StepDone, 2)
        assert [s.step for s in steps] == [1, 2]
        assert {"train/loss", "train/grad_norm", "train/lr", "train/tokens"} <= set(steps[0].metrics)
        first.wait(m.CheckpointStaged)
        (saved,) = first.wait(m.CheckpointSaved)
        (exported,) = first.wait(m.ModelExported)
        assert (saved.step, saved.error, exported.error) == (2, "", "")
        assert exported.path == str(run.safetensors / "step_2")
        assert (run.safetensors / "step_2" / "model.safetensors").is_file()
        write_complete(run.checkpoint(2))
        assert "step 2/3 loss" in first.output()
        assert f"finished: {exported.path}" in first.output()
        first.command(m.TrainStep(3))
        (_, _, third) = first.wait(m.StepDone, 3)
    finally:
        first.close()  # kill -9

    second = Driver(run, 2, redis_server)
    try:
        (ready,) = second.wait(m.PolicyReady)
        assert ready.step == 2
        second.command(m.TrainStep(3), m.Stop("done"))
        (again,) = second.wait(m.StepDone)
        assert numbers(again.metrics) == numbers(third.metrics)
        second.wait(m.RoleStopped)
        assert second.processes[0].wait(30) == 0
    finally:
        second.close()


def test_a_failure_is_reported_with_its_cause(
    prepared: tuple[Recipe, RunDir], redis_server: RedisServer
) -> None:
    _, run = prepared
    driver = Driver(run, 1, redis_server)
    try:
        driver.wait(m.PolicyReady)
        driver.command(m.TrainStep(7))
        (failed,) = driver.wait(m.RoleFailed)
        assert failed.phase == "step"
        assert "step 7 was commanded after step 0" in failed.cause
        assert driver.processes[0].wait(30) != 0
    finally:
        driver.close()
