"""The real RL controller with a policy and replicas that obey in random order, all in one process."""

from __future__ import annotations

import json
import random
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hpc_rl.bus import messages as m
from hpc_rl.controller.rl import RlController
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from hpc_rl.types import PromptGroup, Trajectory, VersionSpan
from tests.controller.sft_simulation import write_policy_part

PROMPTS_PER_STEP, GROUP_SIZE, STALENESS, ROUNDS = 2, 2, 2, 3000


class SentMessages:
    """Stands where the bus is: keeps what the controller sends, by stream."""

    def __init__(self) -> None:
        self.streams: dict[str, deque[Any]] = defaultdict(deque)

    def send(self, stream: str, message: Any) -> None:
        self.streams[stream].append(message)

    def send_all(self, messages: list[tuple[str, Any]]) -> None:
        for stream, message in messages:
            self.send(stream, message)

    def heartbeats(self) -> dict:
        return {}


def make_controller(
    folder: Path,
    *,
    steps: int,
    replicas: int,
    before: bool,
    checkpoint: dict[str, Any] | None = None,
    algorithm: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    attempt: int = 1,
) -> RlController:
    """In `folder`; a further attempt goes on in the run directory of the first."""
    if attempt == 1:
        run = RunDir.create(folder, "simulated")
    else:
        (root,) = (folder / "simulated").iterdir()
        run = RunDir(root)
    data = {"format": "prompt_answer", "prompt": "prompt", "answer": "answer"}
    for name, rows in (("train", 8), ("eval", 3)):
        lines = (json.dumps({"prompt": f"p{i}", "answer": str(i)}) for i in range(rows))
        (run.root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = Recipe.model_validate(
        {
            "name": "simulated",
            "kind": "rl",
            "model": {"path": "none"},
            "data": {name: {"path": str(run.root / f"{name}.jsonl"), **data} for name in ("train", "eval")},
            "algorithm": {
                "name": "grpo",
                "group_size": GROUP_SIZE,
                "max_staleness": STALENESS,
                **(algorithm or {}),
            },
            "reward": [{"name": "exact"}],
            "policy": {"batch_size": PROMPTS_PER_STEP * GROUP_SIZE, "steps": steps, **(policy or {})},
            "rollout": {"replicas": replicas, "max_in_flight": 8, **(rollout or {})},
            "checkpoint": {"export": "off", **(checkpoint or {"enabled": False})},
            "eval": {"every": 2, "before": before, **(evaluation or {})},
            "logging": {"wandb": {"mode": "off"}},
        }
    )
    mesh = SimpleNamespace(world_size=1, dp_replicate=1, dp_shard=1, tp=1, pp=1, cp=1)
    role: Any = SimpleNamespace(
        recipe=recipe, plan=SimpleNamespace(mesh=mesh, groups=[], pair_cost=0.0),
        run_dir=run, attempt=attempt,
        bus=SentMessages(),
        phase=lambda *_: None,
    )  # fmt: skip
    controller = RlController(role)
    controller.members.start_all()
    return controller


class Simulation:
    """`run()` until the controller has sent Stop, or ROUNDS are over (it hangs)."""

    def __init__(self, controller: RlController, seed: int, *, deaths: int, ack: float) -> None:
        """At most `deaths` replicas die; `ack` is how willingly an applied push is acknowledged."""
        self.controller, self.rng, self.deaths_left, self.ack = controller, random.Random(seed), deaths, ack
        self.streams = controller.role.bus.streams  # type: ignore[attr-defined]
        self.replicas = range(controller.replicas)
        self.incarnation = dict.fromkeys(self.replicas, 1)
        self.version = dict.fromkeys(self.replicas, 0)
        self.answers: dict[int, deque[Any]] = {index: deque() for index in self.replicas}
        self.starting = [(index, 1) for index in self.replicas]
        self.policy_version = 0
        self.trained: list[int] = []
        self.staleness = 0
        self.denominators: set[float] = set()
        self.evaluated: dict[str, set[int]] = defaultdict(set)  # evaluation -> versions that answered
        self.skill: Callable[[int], float] = lambda version: 0.0  # what a version scores in evaluations
        self.score = 1.0  # of every second answer to a training prompt
        self.silent: Callable[[int], bool] = lambda ordinal: False  # whose answers all score the same

    def run(self, rounds: int = ROUNDS, *, step: int = 0) -> bool:
        """`step`: the checkpoint that the policy starts from."""
        self.policy_version = step
        self.tell(m.PolicyReady(0, step, {}))
        for _ in range(rounds):
            action = self.rng.random()
            if self.starting and action < 0.3:
                self.replica_loads()
            elif action < 0.55:
                self.policy_acts()
            else:
                self.replica_acts(self.rng.choice(self.replicas))
            self.controller.advance()
            self.controller.finish_if_done()
            if self.controller.stop_sent:
                return True
        return False

    def tell(self, message: Any) -> None:
        self.controller.handle(message)

    def replica_loads(self) -> None:
        index, incarnation = self.starting.pop(self.rng.randrange(len(self.starting)))
        if incarnation == self.incarnation[index]:
            self.tell(m.ReplicaReady(index, incarnation, 0, {}))

    def policy_acts(self) -> None:
        inbox = self.streams[m.inbox("policy", 0)]
        match inbox.popleft() if inbox else None:
            case m.TrainStep() as command:
                assert command.step == self.policy_version + 1
                self.denominators.add(command.denominator)
                for sample in (s for batch in command.micro_batches for s in batch.samples):
                    self.trained.append(sample.ordinal)
                    self.staleness = max(self.staleness, command.step - 1 - sample.version)
                self.policy_version = command.step
                self.tell(m.StepDone(command.step, 0.1, {}))
            case m.SaveCheckpoint() as command:
                assert command.step == self.policy_version
                write_policy_part(self.controller.run_dir.checkpoint(command.step))
                self.tell(m.CheckpointSaved(command.step, 0.1))
            case m.PushWeights() as command:
                assert command.version == self.policy_version
                self.tell(m.WeightsPushed(command.version, 0.1, 1, {}))

    def replica_acts(self, index: int) -> None:
        inbox, answers = self.streams[m.inbox("rollout", index)], self.answers[index]
        member = self.controller.members.replicas[index]
        may_die = self.deaths_left and member.state in ("live", "loaded") and member.restarts < 2
        if may_die and self.rng.random() < 0.01:
            self.deaths_left -= 1
            inbox.clear()
            answers.clear()
            self.tell(m.StepExited("rollout", index, self.incarnation[index], 1, 0.0))
            self.incarnation[index] += 1
            self.starting.append((index, self.incarnation[index]))
        elif inbox and self.rng.random() < 0.5:
            self.obey(index, inbox.popleft())
        elif answers:
            willing = self.ack if isinstance(answers[0], m.WeightsApplied) else 0.8
            if self.rng.random() < willing:
                self.tell(answers.popleft())

    def obey(self, index: int, message: Any) -> None:
        if isinstance(message, m.ReceiveWeights):
            self.version[index] = message.version
            self.answers[index].append(
                m.WeightsApplied(index, self.incarnation[index], message.version, 1, {})
            )
        elif isinstance(message, m.Generate):
            if message.purpose == "eval":
                self.evaluated[message.tag.split(":")[0]].add(self.version[index])
            self.answers[index].append(self.group(index, message))

    def group(self, index: int, request: m.Generate) -> m.GroupDone:
        version = self.version[index]
        spans = [VersionSpan(version, 0, 2)]
        spread = 0 if self.silent(request.prompt.ordinal) else 1
        scores = [
            self.score * (i % 2) * spread if request.purpose == "train" else self.skill(version)
            for i in range(request.group_size)
        ]
        trajectories = [
            Trajectory(
                request.prompt.ordinal, i, index, [1], [2, 3], [-1.0, -1.0], spans, "stop",
                rewards={"exact": float(score)}, reward=float(score),
            )
            for i, score in enumerate(scores)
        ]  # fmt: skip
        return m.GroupDone(
            index,
            self.incarnation[index],
            request.purpose,
            request.tag,
            PromptGroup(request.prompt, trajectories),
        )
