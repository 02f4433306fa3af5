"""One evaluation and nothing else (`eval.only`): what `hpc-rl eval` starts.

RL needs rollout replicas alone: they load the weights, the prompts of `data.eval` are handed out once, the
answers are scored, and everybody stops. SFT needs a policy that measures its validation loss once. The
result is written to the run directory (`run/evaluations.py`).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from hpc_rl.bus import messages as m
from hpc_rl.controller.base import EXIT_REQUEUE, Controller
from hpc_rl.controller.dispatch import Dispatcher
from hpc_rl.controller.evaluation import Evaluation, evaluator_of
from hpc_rl.controller.members import AttemptFailed, Replica
from hpc_rl.controller.monitor import make_recorder
from hpc_rl.controller.scoring import ScoringGroups
from hpc_rl.controller.sft import SftController
from hpc_rl.recipe.schema import Recipe
from hpc_rl.roles import RoleProcess
from hpc_rl.run.evaluations import Evaluated, answers_file, result_file, write_evaluated

LOG = logging.getLogger("hpc_rl.controller")
ANSWER_LIMIT_S = 1800.0


def evaluated(recipe: Recipe, metrics: dict[str, float], seconds: float) -> Evaluated:
    """The result of the evaluation that `recipe` describes."""
    model = recipe.eval.checkpoint or recipe.model.path
    data = recipe.data.eval.path if recipe.data.eval is not None else recipe.data.train.path
    return Evaluated(Path(model).name, model, data, time.time(), seconds, metrics)


class RlEvaluation(Controller):
    """Prompts to replicas that get no weights but those they loaded."""

    def __init__(self, role: RoleProcess) -> None:
        assert role.recipe.rollout is not None
        self.replicas = role.recipe.rollout.replicas
        super().__init__(role)
        limit = role.recipe.rollout.max_in_flight
        self.dispatch = Dispatcher(self.members, None if limit == "auto" else limit)
        self.scoring = ScoringGroups(self.members, role.bus.send)
        self.evaluator = evaluator_of(role.recipe, self.run_dir.root, keep_texts=True)
        if not self.evaluator.prompts:
            raise AttemptFailed("there is nothing to evaluate on: data.eval names no rows")
        self.recorder = make_recorder(role, 0, restored=0)
        self.evaluator.begin(0)
        self.began = self.last_answer = time.monotonic()
        self.started = True  # nobody else has to be waited for
        self.events.append("evaluating", prompts=len(self.evaluator.prompts))

    def begin(self, step: int, info: dict[str, str]) -> None:
        raise AssertionError("an evaluation of answers has no policy")

    def step_done(self, message: m.StepDone) -> None:
        raise AssertionError("an evaluation trains nothing")

    def handle_other(self, message: m.Message) -> None:
        match message:
            case m.ReplicaReady():
                replica = self.members.find(message.replica, message.incarnation)
                if replica is not None:
                    LOG.info("%s ready: %s", replica.name, message.info)
                    replica.version = 0
                    replica.enter("live")
                    self.scoring.introduce(replica)
                    self.dispatch.changed()
                    self.last_answer = time.monotonic()
            case m.ScoringReady():
                self.scoring.ready(message)
            case m.GroupDone() | m.GroupFailed():
                self.answered(message)
            case _:
                super().handle_other(message)

    def answered(self, message: m.GroupDone | m.GroupFailed) -> None:
        self.last_answer = time.monotonic()
        if self.members.find(message.replica, message.incarnation) is not None:
            load = message.load if isinstance(message, m.GroupDone) else None
            self.dispatch.ended(message.replica, load, self.evaluator.options.samples)
        metrics = self.evaluator.answered(message)
        if metrics is not None:
            assert self.evaluator.last is not None
            self.conclude(metrics, self.evaluator.last)

    def conclude(self, metrics: dict[str, float], evaluation: Evaluation) -> None:
        """Write the result; the next `finish_if_done` stops everybody. An evaluation that measured nothing
        has failed: the reasons are in the log."""
        assert self.recorder is not None
        if "eval/accuracy" not in metrics:
            why = "; ".join(sorted(set(evaluation.failed.values()))[:3]) or "no answer could be scored"
            raise AttemptFailed(
                f"none of {len(self.evaluator.prompts)} prompts was answered and scored: {why}"
            )
        seconds = time.monotonic() - self.began
        result = evaluated(self.recipe, metrics, seconds)
        write_evaluated(
            self.run_dir, result, (self.row(evaluation, i) for i in range(len(self.evaluator.prompts)))
        )
        self.recorder.step(0, metrics)
        self.events.append("evaluated", **metrics)
        LOG.info(
            "evaluated in %.1f s: %s, %s", seconds, result_file(self.run_dir), answers_file(self.run_dir)
        )
        self.ending = (0, "done")

    def row(self, evaluation: Evaluation, index: int) -> dict[str, Any]:
        """A prompt with its answers, as it is written."""
        prompt = self.evaluator.prompts[index]
        return {
            "row": prompt.row,
            "prompt": prompt.content,
            "answer": prompt.answer,
            **({"failed": evaluation.failed[index]} if index in evaluation.failed else {}),
            "samples": [one.as_json() for one in evaluation.answers.get(index, [])],
        }

    def advance(self) -> None:
        if self.ending is not None:
            return
        for replica in self.dispatch.candidates():
            request = self.evaluator.next_request(replica.index, replica.incarnation)
            if request is None:
                return
            if self.dispatch.all_idle:
                self.last_answer = time.monotonic()
            self.dispatch.began(replica.index)
            self.role.bus.send(m.inbox("rollout", replica.index), request)

    def replica_lost(self, replica: Replica) -> None:
        self.events.append("replica_lost", role=replica.role, index=replica.index, cause=replica.causes[-1])
        if replica.role != "rollout":
            self.scoring.changed(replica.role)
            return
        self.dispatch.lost(replica.index)
        self.evaluator.give_back(replica.index)

    def tick(self) -> None:
        super().tick()
        waiting = sorted(index for index, load in self.dispatch.loads.items() if load)
        if waiting and self.stop_sent is None and time.monotonic() - self.last_answer > ANSWER_LIMIT_S:
            who = ", ".join(f"rollout {index}" for index in waiting)
            raise AttemptFailed(f"no answer for {ANSWER_LIMIT_S:.0f} s from {who}")

    def finish_if_done(self) -> None:
        if self.ending is not None:
            _unrepeated(self)
            self.stop_everyone()


class SftEvaluation(SftController):
    """The validation loss of the weights that the policy loads."""

    def begin(self, step: int, info: dict[str, str]) -> None:
        super().begin(step, info)
        if not self.evaluates:
            raise AttemptFailed(
                "there is nothing to evaluate on: neither data.eval nor data.holdout has rows"
            )
        self.total_steps = step
        if self.evaluating is None:
            self._evaluate(step)

    def eval_done(self, message: m.EvalDone) -> None:
        super().eval_done(message)
        write_evaluated(self.run_dir, evaluated(self.recipe, message.metrics, message.seconds))
        LOG.info("evaluated: %s", result_file(self.run_dir))
        self.ending = (0, "done")

    def advance(self) -> None:
        return None  # nothing is trained

    def finish_if_done(self) -> None:
        if self.ending is not None and (self.evaluating is None or self.ending[0] != 0):
            _unrepeated(self)
            self.stop_everyone()


def _unrepeated(controller: Controller) -> None:
    """At the walltime nothing is kept, so a requeue would begin anew and end the same way."""
    assert controller.ending is not None
    if controller.ending[0] == EXIT_REQUEUE:
        raise AttemptFailed(
            "the walltime came before the end of the evaluation, which begins anew each time: give it more "
            "(cluster.time), more replicas (rollout.replicas) or fewer rows (data.eval.limit)"
        )
