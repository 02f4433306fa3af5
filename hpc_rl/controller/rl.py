"""RL: prompts out, trajectories in, advantages, steps, new weights to the replicas, without waiting.

The loop has no phases. Whenever a message arrives or a second passes, `advance` starts all that can start:
hand prompts to replicas with room (`generation.py`, bounded by staleness: `window.py`), send the next step to
the policy when its prompts are there, push weights after a step. Generation, training and pushing overlap.

Order at a step boundary, as the policy's inbox sees it: SaveCheckpoint(s), PushWeights(s), TrainStep(s+1).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from hpc_rl.bus import messages as m
from hpc_rl.controller.base import TICK_S, Controller
from hpc_rl.controller.batch import BatchOptions, PreparedStep
from hpc_rl.controller.evaluation import evaluator_of
from hpc_rl.controller.evaluation_turn import EvaluationTurn
from hpc_rl.controller.generation import Generation
from hpc_rl.controller.members import AttemptFailed, Replica
from hpc_rl.controller.monitor import make_recorder
from hpc_rl.controller.oversample import cancelled_flights, make_window
from hpc_rl.controller.packer import POLL_S, Packer
from hpc_rl.controller.prompts import PromptSource
from hpc_rl.controller.pushes import Pushes
from hpc_rl.controller.scoring import ScoringGroups
from hpc_rl.controller.shares import Share
from hpc_rl.controller.signal_watch import SignalWatch
from hpc_rl.controller.state import read_state, write_state
from hpc_rl.controller.window import Chosen
from hpc_rl.recipe.extensions import registry
from hpc_rl.roles import RoleProcess
from hpc_rl.run.ledger import PromptLedger
from hpc_rl.simulators.config import credit_of

LOG = logging.getLogger("hpc_rl.controller")
EMPTY_STEPS_LIMIT = 10


class RlController(Controller):
    """One attempt of an RL run."""

    usual_metric = "eval/accuracy"

    def __init__(self, role: RoleProcess) -> None:
        assert role.recipe.rollout is not None
        self.replicas = role.recipe.rollout.replicas
        super().__init__(role)
        self.rollout = role.recipe.rollout
        self.algorithm = registry("algorithms").config(role.recipe.algorithm["name"], role.recipe.algorithm)
        self.ledger = PromptLedger(role.run_dir, role.attempt)
        self.outbox: list[tuple[str, m.Message]] = []  # for replicas, sent in one exchange
        self.pushes = Pushes(
            self.members,
            to_policy=self.to_policy,
            to_replica=lambda index, message: self.outbox.append((m.inbox("rollout", index), message)),
            timeout_s=self.rollout.weights.timeout_s,
        )
        self.scoring = ScoringGroups(self.members, role.bus.send)
        self.batch: dict[int, tuple[Chosen, dict[str, float]]] = {}
        self.signal = SignalWatch()
        self.empty_steps = 0  # in a row
        self.policy_idle = Share()
        self.stepped = time.monotonic()

    # --- start and restore ------------------------------------------------------------------------
    def begin(self, step: int, info: dict[str, str]) -> None:
        recipe, base = self.recipe, self.run_dir.root
        self.stepped, self.policy_idle = time.monotonic(), Share()  # what came before was loading
        self.source = PromptSource(recipe.data.train, base=base, seed=recipe.seed)
        self.window = make_window(recipe, self.algorithm, len(self.source))
        self.total_steps = self.window.total_steps
        mesh = self.plan.mesh
        self.packing = BatchOptions.of(
            self.algorithm,
            max_tokens=self.rollout.max_tokens,
            data_parallel=mesh.dp_replicate * mesh.dp_shard,
            ranks_per_replica=mesh.tp * mesh.pp * mesh.cp,
            micro_batch_tokens=recipe.policy.micro_batch_tokens,
            micro_batch_size=recipe.policy.micro_batch_size,
            credit=credit_of(recipe),
            mini_batches=recipe.policy.updates.mini_batches,
            seed=recipe.seed,
            pair_cost=self.plan.pair_cost,
        )
        self.packer = Packer(self.packing)
        self.evaluator = evaluator_of(recipe, base)
        self.recorder = make_recorder(self.role, self.total_steps, restored=step)
        self.generation = Generation(
            recipe,
            self.algorithm,
            self.members,
            self.window,
            self.source,
            send=self.role.bus.send_all,
            tell=self.events.append,
        )
        if step > 0:
            folder = self.run_dir.checkpoint(step) / "controller"
            read_state(folder, step, self.window, self.source, self.evaluator, self.recorder)
        self.turn = EvaluationTurn(self.evaluator, self.recorder, self.members, self.pushes, self.events)
        if self.evaluator.due(step, self.total_steps):
            self.turn.expect(step)

    def write_state(self, folder: Path, step: int) -> None:
        assert self.recorder is not None
        write_state(folder, step, self.window, self.source, self.evaluator, self.recorder)

    # --- messages ---------------------------------------------------------------------------------
    def handle_other(self, message: m.Message) -> None:
        match message:
            case m.ReplicaReady():
                replica = self.members.find(message.replica, message.incarnation)
                if replica is not None:
                    LOG.info("%s ready: %s", replica.name, message.info)
                    replica.enter("loaded")
                    self.scoring.introduce(replica)
            case m.ScoringReady():
                self.scoring.ready(message)
            case m.GroupDone() | m.GroupFailed():
                self.group_answered(message)
            case m.WeightsApplied():
                self.pushes.applied(message)
                self._members_changed()
            case m.WeightsFailed():
                self.pushes.failed(message)
            case m.WeightsPushed():
                self.pushes.reported(message)
                self._members_changed()
            case _:
                super().handle_other(message)

    def group_answered(self, message: m.GroupDone | m.GroupFailed) -> None:
        self.generation.answered(message)
        if message.purpose == "eval":
            self.eval_answer(message)
        elif isinstance(message, m.GroupDone):
            self.generation.done(message)
        else:
            self.generation.failed(message)

    def _members_changed(self) -> None:
        """A replica became live, has new weights or is receiving some."""
        if self.started:
            self.generation.dispatch.changed()

    def eval_answer(self, message: m.GroupDone | m.GroupFailed) -> None:
        assert self.recorder is not None
        step = self.evaluator.current.step if self.evaluator.current else 0
        metrics = self.evaluator.answered(message)
        if metrics is not None:
            LOG.info("evaluation at step %d: accuracy %.3f", step, metrics.get("eval/accuracy", float("nan")))
            self.recorder.release(step, metrics)
            if self.saves.has(step):
                self.saves.evaluated(step, self.best_metric, metrics.get(self.best_metric))

    def replica_lost(self, replica: Replica) -> None:
        self.events.append("replica_lost", role=replica.role, index=replica.index, cause=replica.causes[-1])
        if replica.role != "rollout":
            self.scoring.changed(replica.role)
            return
        if not self.started:
            return
        self.pushes.settle()
        self.generation.lost(replica, self.evaluator)

    # --- decisions --------------------------------------------------------------------------------
    def advance(self) -> None:
        self._accept_first_weights()
        self.turn.give_up_if_lost(self.commanded)
        if not self.ending_early():
            self.turn.begin_if_ready()
        self._push_if_useful()
        self._train_if_ready()  # before the prompts: the policy waits for it
        if not self.ending_early():
            self.generation.hand_out(self.evaluator)
        self._prepare()
        self.generation.check()

    def _accept_first_weights(self) -> None:
        """At step 0 a freshly loaded engine has the recipe's weights: that is version 0. Not so where the
        policy begins with a saved adapter: then version 0 is pushed."""
        lora = self.recipe.model.lora
        if self.step > 0 or self.commanded > 0 or (lora is not None and lora.adapter is not None):
            return
        for replica in self.members.replicas.values():
            if replica.state == "loaded":
                replica.version = 0
                replica.enter("live")
                self.pushes.newest = max(self.pushes.newest, 0)
                self._members_changed()

    def _push_if_useful(self) -> None:
        """Between steps, when a replica is behind, no push is under way and no evaluation needs peace."""
        policy_idle = self.step == self.commanded
        if self.pushes.under_way is not None or not policy_idle or self.ending_early():
            return
        needed = self.step < self.total_steps or self.turn.version == self.step
        if self.turn.allows_push(self.step) and needed and (behind := self.pushes.behind(self.step)):
            self.pushes.begin(self.step, behind)
            self._flush()
            self._members_changed()

    def _prepare(self) -> None:
        """Pack the next step as soon as its prompts are there, while the policy is still busy."""
        if self.packer.empty and self.window.ready():
            chosen = self.window.reserve()
            self.packer.begin(chosen)
            for replica, tags in cancelled_flights(chosen).items():
                self.outbox.append((m.inbox("rollout", replica), m.CancelGroups(tags)))
            self._flush()
        self.poll_s = POLL_S if self.packer.busy else TICK_S / 5

    def _flush(self) -> None:
        self.role.bus.send_all(self.outbox)
        self.outbox = []

    def _train_if_ready(self) -> None:
        if self.step != self.commanded or self.ending or self._must_push_first():
            return
        self._prepare()
        ready = self.packer.take()
        if ready is None:
            return
        chosen = self.window.ahead
        assert chosen is not None and chosen.step == ready.step
        for rank, command in enumerate(ready.commands):
            self.role.bus.send(m.inbox("policy", rank), command)
        self.window.commit()
        self.policy_idle.add(1.0)
        self._check_empty(ready, chosen.drops)
        metrics = {**ready.metrics, **self.generation.metrics()}
        metrics["rollout/dropped"] = float(len(chosen.drops))
        metrics["rollout/refilled"] = float(chosen.refilled)
        metrics["rollout/cancelled"] = float(chosen.again)
        self.batch[ready.step] = (chosen, metrics)
        self.commanded, self.last_progress = ready.step, time.monotonic()
        if self.window.over:  # with epochs, dropped prompts that were replaced make fewer steps
            self.total_steps = ready.step
            assert self.recorder is not None
            self.recorder.total = ready.step

    def _check_empty(self, ready: PreparedStep, drops: dict[int, str]) -> None:
        """One step without a token to train on is bad luck; several in a row are a mistake somewhere."""
        self.empty_steps = self.empty_steps + 1 if ready.empty else 0
        if not ready.empty:
            return
        reasons = (
            "; ".join(sorted(set(drops.values()))[:3])
            or "all answers empty, unscored, alike in reward or without log-probs"
        )
        self.events.append("step_skipped", step=ready.step, dropped=len(drops), reasons=reasons)
        LOG.warning("step %d has nothing to train on and changes no weight: %s", ready.step, reasons)
        if self.empty_steps == EMPTY_STEPS_LIMIT:
            raise AttemptFailed(f"{EMPTY_STEPS_LIMIT} steps in a row had nothing to train on: {reasons}")

    def _must_push_first(self) -> bool:
        """Someone waits for just these weights: an evaluation, or a replica that has none yet."""
        if self.turn.must_be_sent(self.step):
            return True  # whatever is under way: after the next step nobody could send them any more
        if self.pushes.under_way is not None or not self.turn.allows_push(self.step):
            return False
        return any(r.state == "loaded" for r in self.members.replicas.values())

    def step_done(self, message: m.StepDone) -> None:
        assert self.recorder is not None
        chosen, metrics = self.batch.pop(message.step)
        groups, now = chosen.groups, time.monotonic()
        self.policy_idle.add(0.0)
        metrics |= {**message.metrics, "time/train_s": message.seconds, "time/step_s": now - self.stepped}
        metrics["time/policy_idle"] = self.policy_idle.take()
        metrics["time/policy_wait_s"] = metrics["time/policy_idle"] * metrics["time/step_s"]
        if warning := self.signal.step(metrics):
            LOG.warning("step %d: %s", message.step, warning)
            self.events.append("no_signal", step=message.step)
        # the newest push, overlapped with generation
        metrics |= {"time/push_s": self.pushes.seconds, "weights/bytes": float(self.pushes.nbytes)}
        metrics["rollout/tokens_per_s"] = metrics.get("rollout/tokens", 0.0) / max(now - self.stepped, 1e-9)
        self.stepped = now
        self.ledger.append(
            message.step,
            [group.prompt.ordinal for group in groups],
            chosen.drops,
            rows=[group.prompt.row for group in groups],
            epochs=sorted({group.prompt.epoch for group in groups}),
            replicas=sorted({t.replica for group in groups for t in group.trajectories}),
            versions=sorted({s.version for g in groups for t in g.trajectories for s in t.spans}),
        )
        if self.evaluator.due(message.step, self.total_steps):
            if self.turn.free:
                self.turn.expect(message.step)
            elif message.step == self.total_steps:
                self.recorder.hold(message.step)  # `settled` awaits it when the running one is done
        self.recorder.step(message.step, metrics)
        if self.saves.due(message.step, final=message.step == self.total_steps):
            if self.evaluator.due(message.step, self.total_steps):
                self.saves.best.expect(message.step)
            self.saves.save(message.step)

    # --- the end ----------------------------------------------------------------------------------
    def ending_early(self) -> bool:
        return self.ending is not None and self.ending[0] != 0

    def settled(self) -> bool:
        """The last version has been evaluated (if it is to be)."""
        if self.turn.free and self.evaluator.due(self.step, self.total_steps):
            self.turn.expect(self.step)
        return self.turn.free

    def tick(self) -> None:
        super().tick()
        self._members_changed()  # whatever else there may be
        overdue = self.pushes.overdue()
        if overdue:
            raise AttemptFailed(overdue)
