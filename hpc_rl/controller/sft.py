"""SFT: the policy draws its own data; the controller keeps it two steps ahead, evaluates and saves.

At a step that is evaluated the policy's inbox reads TrainStep(s), EvalLoss(s); then the controller waits
for the loss, because a checkpoint of s, should it be the best so far, has to be staged before s + 1.
"""

from __future__ import annotations

import logging
import time

from hpc_rl.bus import messages as m
from hpc_rl.controller.base import Controller
from hpc_rl.controller.evaluation import eval_due
from hpc_rl.controller.members import AttemptFailed
from hpc_rl.controller.monitor import make_recorder
from hpc_rl.roles import RoleProcess

LOG = logging.getLogger("hpc_rl.controller")
AHEAD = 2  # commands in the policy's inbox: it never waits, and a stop takes effect within two steps
EVAL_LIMIT_S = 3600.0


class SftController(Controller):
    """Commands steps 1..total; losses and metrics come from rank 0."""

    def __init__(self, role: RoleProcess) -> None:
        super().__init__(role)
        self.evaluates = False
        self.evaluating: int | None = None  # the step whose validation loss is awaited

    def begin(self, step: int, info: dict[str, str]) -> None:
        self.total_steps = int(info["total_steps"])
        self.evaluates = int(info.get("eval_rows", "0")) > 0
        self.recorder = make_recorder(self.role, self.total_steps, restored=step)
        if self._eval_due(step) and not self.recorder.written(step):
            self._evaluate(step)

    def advance(self) -> None:
        while self._may_command():
            self.commanded += 1
            self.to_policy(m.TrainStep(self.commanded))
            if self._eval_due(self.commanded):
                self._evaluate(self.commanded)  # saved, if it is to be, when the loss is known
            elif self._save_due(self.commanded):
                self.saves.save(self.commanded)

    def _may_command(self) -> bool:
        busy = self.ending is not None or self.evaluating is not None
        return not busy and self.commanded < min(self.total_steps, self.step + AHEAD)

    def _save_due(self, step: int) -> bool:
        return self.saves.due(step, final=step == self.total_steps)

    def _eval_due(self, step: int) -> bool:
        return self.evaluates and eval_due(self.recipe.eval, step, self.total_steps)

    def _evaluate(self, step: int) -> None:
        assert self.recorder is not None
        self.recorder.hold(step)
        self.to_policy(m.EvalLoss(step))
        self.evaluating = step

    def step_done(self, message: m.StepDone) -> None:
        assert self.recorder is not None
        self.recorder.step(message.step, {**message.metrics, "time/step_s": message.seconds})

    def handle_other(self, message: m.Message) -> None:
        match message:
            case m.EvalDone():
                self.eval_done(message)
            case _:
                super().handle_other(message)

    def eval_done(self, message: m.EvalDone) -> None:
        """Write the row, and save what is due or the best so far."""
        assert self.recorder is not None
        assert message.step == self.evaluating
        self.evaluating, self.last_progress = None, time.monotonic()
        loss = message.metrics["eval/loss"]
        LOG.info("evaluation at step %d: loss %.4f (%.1f s)", message.step, loss, message.seconds)
        self.recorder.release(message.step, {**message.metrics, "time/eval_s": message.seconds})
        if message.step == 0:
            return  # the model as it came is no checkpoint
        improved = self.saves.evaluated(message.step, self.best_metric, message.metrics[self.best_metric])
        if self._save_due(message.step) or improved:
            self.saves.save(message.step)

    def finish_if_done(self) -> None:
        """Not while a loss is awaited: the policy answers before it could obey a save anyway."""
        if self.evaluating is None:
            super().finish_if_done()

    def tick(self) -> None:
        super().tick()
        late = time.monotonic() - self.last_progress > EVAL_LIMIT_S
        if self.evaluating is not None and self.step == self.commanded and late:
            raise AttemptFailed(
                f"the policy has not evaluated step {self.evaluating} in {EVAL_LIMIT_S:.0f} s"
            )
