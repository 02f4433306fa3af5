"""A replica as a real process: `python -m hpc_rl.rollout`, with this test as controller and policy."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.bus.client import Bus, Inbox
from hpc_rl.plan.schema import Group, Mesh, Plan
from hpc_rl.recipe.dump import dump_resolved
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from hpc_rl.types import Prompt, Sampling
from hpc_rl.weights.gloo import GlooTransport
from tests.tiny_models import FileSource, save_checkpoint

pytestmark = [pytest.mark.redis, pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=8, seed=7)
REWARD = """
import os
from hpc_rl.recipe.extensions import register
def picky(prompt, response, answer, fields):
    if fields.get("all_crash") or (fields.get("one_crashes") and len(response.split()) % 2):
        os._exit(9)
    return len(response.split())
register("rewards", "picky", implementation="picky_reward:picky")
"""


def group(role: str) -> Group:
    return Group(
        role=role,  # type: ignore[arg-type]
        component=None,
        job_name=f"t:{role}",
        nodes=1,
        tasks=1,
        tasks_per_node=1,
        cpus_per_task=2,
        gpus_per_task=0,
        gpus_per_node=0,
    )


@dataclass
class Replica:
    """The replica's process and the controller's end of the bus."""

    run: RunDir
    bus: Bus
    inbox: Inbox
    process: subprocess.Popen[bytes]
    folders: list[Path]
    log: Path

    def send(self, *messages: m.Message) -> None:
        self.bus.send(m.inbox("rollout", 0), *messages)

    def wait(self, wanted: Callable[[m.Message], bool], limit_s: float = 120.0) -> m.Message:
        deadline = time.monotonic() + limit_s
        while True:
            for message in self.inbox.poll(0.5, count=1):
                if wanted(message):
                    return message
                assert not isinstance(message, m.RoleFailed), message.detail
            assert time.monotonic() < deadline, f"waited {limit_s} s; log: {self.log.read_text()[-3000:]}"

    def ask(self, ordinal: int, content: str = "w1 w2 w3", count: int = 3, **fields: object) -> None:
        prompt = Prompt(ordinal, 0, ordinal, content, None, fields)
        self.send(m.Generate(prompt, count, SAMPLING, "train", f"tag{ordinal}"))


def answers(message: m.Message) -> bool:
    return isinstance(message, m.GroupDone | m.GroupFailed)


@pytest.fixture(scope="module")
def replica(bus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    root = tmp_path_factory.mktemp("worker")
    folders = [save_checkpoint(root / f"model{seed}", seed) for seed in range(2)]
    run = RunDir.create(root, "worker")
    recipe = Recipe.model_validate(
        {
            "name": "worker",
            "kind": "rl",
            "model": {"path": str(folders[0]), "dtype": "float32", "stage": str(root / "stage")},
            "data": {"train": {"path": "none"}},
            "plugins": ["picky_reward.py"],
            "reward": [
                {"name": "picky", "weight": 0.5},
                {"name": "contains", "weight": 1.0, "text": "w"},
                {"name": "overlong", "weight": 2.0, "buffer": 8},
            ],
            "rollout": {"engine": "hf", "max_model_len": 64, "weights": {"timeout_s": 20}},
            "cluster": {"placement": "local"},
        }
    )
    run.resolved.write_text(dump_resolved(recipe))
    (run.code / "picky_reward.py").write_text(REWARD)
    plan = Plan(
        name="worker",
        kind="rl",
        placement="local",
        site="test",
        time_minutes=1,
        groups=[group("policy"), group("rollout")],
        mesh=Mesh(),
        site_profile={"name": "test", "placement": "local"},
    )
    run.plan.write_text(plan.model_dump_json())
    run.open_logs(1)
    target = run.bus_file(1)
    target.touch(0o600)
    target.write_bytes(bus_file.read_bytes())
    log = root / "log"
    bus = Bus.connect(target, 10)
    controller = Inbox(bus, m.inbox("controller"))
    command = [sys.executable, "-m", "hpc_rl.rollout", str(run.root), "--attempt", "1", "--replica", "0"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ})
    yield Replica(run, bus, controller, process, folders, log)
    if process.poll() is None:
        process.kill()
    process.wait(20)


def test_registers_and_gets_ready(replica: Replica) -> None:
    registered = replica.wait(lambda x: isinstance(x, m.Register))
    assert isinstance(registered, m.Register)
    assert (registered.role, registered.index, registered.pid) == ("rollout", 0, replica.process.pid)
    ready = replica.wait(lambda x: isinstance(x, m.ReplicaReady))
    assert isinstance(ready, m.ReplicaReady)
    assert (ready.version, ready.info["engine"]) == (0, "hf")
    (copy,) = (replica.folders[0].parent / "stage").glob("model0-*/model.safetensors")
    assert copy.read_bytes() == (replica.folders[0] / copy.name).read_bytes()


def test_generates_and_scores(replica: Replica) -> None:
    replica.ask(0)
    done = replica.wait(answers)
    assert isinstance(done, m.GroupDone)
    assert (done.tag, done.purpose, done.group.prompt.ordinal) == ("tag0", "train", 0)
    assert len(done.group.trajectories) == 3
    for index, trajectory in enumerate(done.group.trajectories):
        assert trajectory.sample == index
        assert trajectory.prompt_ids == [5, 6, 7]
        words = len(trajectory.text.split())
        contains, over = float("w" in trajectory.text), -len(trajectory.token_ids) / SAMPLING.max_tokens
        assert trajectory.rewards == {"picky": words, "contains": contains, "overlong": over}
        assert trajectory.reward == 0.5 * words + contains + 2.0 * over
        assert len(trajectory.log_probs) == len(trajectory.token_ids)
        assert trajectory.spans[-1].end == len(trajectory.token_ids)


def test_bad_prompts_and_scorer_crashes_cost_only_themselves(replica: Replica) -> None:
    replica.ask(1, content="w1 " * 100)
    replica.ask(2, content="")
    replica.ask(3, all_crash=True)
    replica.ask(4, count=6, one_crashes=True)
    replica.ask(5)
    got = {}
    for _ in range(5):
        message = replica.wait(answers)
        assert isinstance(message, m.GroupDone | m.GroupFailed)
        ordinal = message.ordinal if isinstance(message, m.GroupFailed) else message.group.prompt.ordinal
        got[ordinal] = message
    for ordinal, cause in [(1, "max_model_len"), (2, "no tokens"), (3, "ended with code 9")]:
        message = got[ordinal]
        assert isinstance(message, m.GroupFailed)
        assert cause in message.cause
    mixed = got[4]
    assert isinstance(mixed, m.GroupDone)
    rewards = [t.reward for t in mixed.group.trajectories]
    unscored = [math.isnan(r) for r in rewards]
    assert unscored == [bool(len(t.text.split()) % 2) for t in mixed.group.trajectories]
    assert mixed.metrics["rollout/unscored"] == sum(unscored)
    assert isinstance(got[5], m.GroupDone)


def test_new_weights_are_acknowledged_and_used(replica: Replica) -> None:
    sender = GlooTransport.sender(
        replica.run.bus_file(1), attempt=1, workers=1, bucket_bytes=1 << 20, timeout_s=20.0
    )
    results = []
    push = threading.Thread(
        target=lambda: results.append(sender.push(1, FileSource(replica.folders[1]), [0], [1]))
    )
    push.start()
    replica.send(m.ReceiveWeights(1))
    applied = replica.wait(lambda x: isinstance(x, m.WeightsApplied | m.WeightsFailed))
    push.join(20)
    assert isinstance(applied, m.WeightsApplied)
    assert (applied.version, applied.tensors) == (1, len(FileSource(replica.folders[1]).tensors))
    assert applied.metrics["weights/probe_change"] > 1e-3
    assert results[0].failed == {}
    replica.ask(6)
    done = replica.wait(answers)
    assert isinstance(done, m.GroupDone)
    assert {s.version for t in done.group.trajectories for s in t.spans} == {1}


def test_a_push_that_never_comes_is_reported_and_ends_the_replica(replica: Replica) -> None:
    """The policy is silent: the deadline passes, the cause is named, a new incarnation is needed."""
    replica.send(m.ReceiveWeights(2))
    failed = replica.wait(lambda x: isinstance(x, m.WeightsFailed), 60)
    assert isinstance(failed, m.WeightsFailed)
    assert failed.version == 2
    role_failed = replica.wait(lambda x: isinstance(x, m.RoleFailed), 60)
    assert isinstance(role_failed, m.RoleFailed)
    assert "WeightTransferError" in role_failed.cause
    assert replica.process.wait(30) == 1


def test_a_new_incarnation_joins_and_stops_when_told(replica: Replica) -> None:
    """What was sent to the earlier incarnation is not for this one; Stop ends it with code 0."""
    replica.ask(7)
    command = [sys.executable, "-m", "hpc_rl.rollout", str(replica.run.root), "--attempt", "1"]
    with replica.log.open("ab") as out:
        replica.process = subprocess.Popen(
            [*command, "--incarnation", "2", "--replica", "0"], cwd=ROOT, stdout=out, stderr=out
        )
    ready = replica.wait(lambda x: isinstance(x, m.ReplicaReady))
    assert isinstance(ready, m.ReplicaReady)
    assert (ready.incarnation, ready.version) == (2, 0)
    long = Sampling(temperature=1.0, top_p=1.0, max_tokens=50, seed=3)
    for ordinal in (20, 21):  # the hf engine has one at a time: the second waits
        prompt = Prompt(ordinal, 0, ordinal, "w1 w2", None, {})
        replica.send(m.Generate(prompt, 8, long, "train", f"tag{ordinal}"))
    replica.send(m.CancelGroups(["tag21", "tag20", "tag99"]))
    replica.ask(8)
    found = [replica.wait(answers) for _ in range(3)]
    failed = {answer.ordinal: answer for answer in found if isinstance(answer, m.GroupFailed)}
    assert set(failed) == {20, 21} and {answer.tag for answer in failed.values()} == {"tag20", "tag21"}
    assert all("cancelled" in answer.cause for answer in failed.values())
    (done,) = (answer for answer in found if isinstance(answer, m.GroupDone))
    assert done.group.prompt.ordinal == 8
    assert done.load is not None and done.load.waiting == 0
    replica.send(m.Stop("the run is over"))
    replica.wait(lambda x: isinstance(x, m.RoleStopped))
    assert replica.process.wait(30) == 0
