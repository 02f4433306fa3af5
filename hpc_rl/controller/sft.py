"""SFT: the policy draws its own data; the controller keeps it two steps ahead and decides the saves."""

from __future__ import annotations

from hpc_rl.bus import messages as m
from hpc_rl.controller.base import Controller
from hpc_rl.controller.monitor import make_recorder

AHEAD = 2  # commands in the policy's inbox: it never waits, and a stop takes effect within two steps


class SftController(Controller):
    """Commands steps 1..total; the loss and its metrics come from rank 0."""

    def begin(self, step: int, info: dict[str, str]) -> None:
        self.total_steps = int(info["total_steps"])
        self.recorder = make_recorder(self.role, self.total_steps, restored=step)

    def advance(self) -> None:
        while (
            self.ending is None and self.commanded < self.total_steps and self.commanded < self.step + AHEAD
        ):
            self.commanded += 1
            self.to_policy(m.TrainStep(self.commanded))
            if self.saves.due(self.commanded, final=self.commanded == self.total_steps):
                self.saves.save(self.commanded)

    def step_done(self, message: m.StepDone) -> None:
        assert self.recorder is not None
        self.recorder.step(message.step, {**message.metrics, "time/step_s": message.seconds})
