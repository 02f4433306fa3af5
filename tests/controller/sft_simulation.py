"""The real SFT controller with a policy that obeys, in one process; its "weights" are the step's number."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hpc_rl.bus import messages as m
from hpc_rl.controller.sft import SftController
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir

ROUNDS = 2000


class SentMessages:
    """Stands where the bus is: keeps what the controller sends, by stream."""

    def __init__(self) -> None:
        self.streams: dict[str, deque[Any]] = defaultdict(deque)

    def send(self, stream: str, message: Any) -> None:
        self.streams[stream].append(message)

    def heartbeats(self) -> dict:
        return {}


def make_controller(run: RunDir, attempt: int = 1, **sections: Any) -> SftController:
    recipe = Recipe.model_validate(
        {
            "name": "simulated",
            "kind": "sft",
            "model": {"path": "none"},
            "data": {"train": {"path": "none.jsonl"}},
            "policy": {"steps": 10},
            "logging": {"wandb": {"mode": "off"}},
            **sections,
        }
    )
    mesh = SimpleNamespace(world_size=1, dp_replicate=1, dp_shard=1, tp=1, pp=1, cp=1)
    role: Any = SimpleNamespace(
        recipe=recipe, plan=SimpleNamespace(mesh=mesh, groups=[]), run_dir=run, attempt=attempt,
        bus=SentMessages(),
        phase=lambda *_: None,
    )  # fmt: skip
    controller = SftController(role)
    controller.members.start_all()
    return controller


class Policy:
    """Obeys in order. `loss(step)` is the validation loss; `log` has what was done to which weights."""

    def __init__(
        self, controller: SftController, loss: Callable[[int], float], *, step: int = 0, eval_rows: int = 5
    ) -> None:
        self.controller, self.loss, self.step = controller, loss, step
        self.inbox = controller.role.bus.streams[m.inbox("policy", 0)]  # type: ignore[attr-defined]
        self.log: list[tuple[str, int]] = []
        self.say(m.PolicyReady(0, step, {"total_steps": "10", "eval_rows": str(eval_rows)}))

    def say(self, message: Any) -> None:
        self.controller.handle(message)

    def run(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Until the controller has sent Stop, or `until` holds; False when neither comes."""
        for _ in range(ROUNDS):
            self.controller.advance()
            self.controller.finish_if_done()
            if self.controller.stop_sent or until():
                return True
            if self.inbox:
                self.obey(self.inbox.popleft())
        return False

    def obey(self, command: Any) -> None:
        match command:
            case m.TrainStep():
                assert command.step == self.step + 1
                self.step = command.step
                self.log.append(("train", self.step))
                self.say(m.StepDone(self.step, 0.1, {"train/loss": 1.0}))
            case m.EvalLoss():
                assert command.step == self.step
                self.log.append(("eval", self.step))
                self.say(m.EvalDone(self.step, 0.1, {"eval/loss": self.loss(self.step)}))
            case m.SaveCheckpoint():
                assert command.step == self.step
                self.log.append(("save", self.step))
                write_policy_part(self.controller.run_dir.checkpoint(command.step))
                self.say(m.CheckpointSaved(self.step, 0.1))
            case m.ExportModel():
                self.say(m.ModelExported(self.step, command.label, "nowhere", 0.1))


def write_policy_part(folder: Path) -> None:
    (folder / "policy").mkdir(parents=True, exist_ok=True)
    (folder / "policy" / ".metadata").write_text("x")
