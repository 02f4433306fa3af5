"""RL: prompts out, trajectories in, advantages, steps, new weights to the replicas, without waiting.

The loop has no phases. Whenever a message arrives or a second passes, `advance` starts all that can start:
hand prompts to replicas with room (bounded by staleness, `window.py`), send the next step to the policy
when its prompts are all there, push weights after a step. Generation, training and pushing overlap.

Order at a step boundary, as the policy's inbox sees it: SaveCheckpoint(s), PushWeights(s), TrainStep(s+1).
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import msgspec

from hpc_rl.bus import messages as m
from hpc_rl.controller.base import Controller
from hpc_rl.controller.batch import BatchOptions, make_samples, rollout_metrics, train_steps
from hpc_rl.controller.evaluation import Evaluator
from hpc_rl.controller.members import AttemptFailed, Replica
from hpc_rl.controller.monitor import make_recorder
from hpc_rl.controller.prompts import PromptSource, prompt_seed
from hpc_rl.controller.window import PromptWindow
from hpc_rl.recipe.extensions import registry
from hpc_rl.roles import RoleProcess
from hpc_rl.run.ledger import PromptLedger
from hpc_rl.types import PromptGroup, Sampling

LOG = logging.getLogger("hpc_rl.controller")
GENERATE_LIMIT_S = 1800.0
PUSH_SLACK_S = 60.0


class RlController(Controller):
    """One attempt of an RL run."""

    def __init__(self, role: RoleProcess) -> None:
        assert role.recipe.rollout is not None
        self.replicas = role.recipe.rollout.replicas
        super().__init__(role)
        self.rollout = role.recipe.rollout
        self.algorithm = registry("algorithms").config(role.recipe.algorithm["name"], role.recipe.algorithm)
        self.ledger = PromptLedger(role.run_dir, role.attempt)
        self.pushing: tuple[int, float] | None = None  # (version, since); until all have answered
        self.awaiting: int | None = None  # this version is to be evaluated next
        self.push_seconds: float | None = None  # of the last push, once rank 0 has reported it
        self.pushed = -1  # newest version the replicas were sent
        self.batch: dict[int, tuple[list[PromptGroup], dict[int, str], dict[str, float]]] = {}
        self.last_group = time.monotonic()
        self.idle_since: float | None = None
        self.stepped = time.monotonic()

    # --- start and restore ------------------------------------------------------------------------
    def begin(self, step: int, info: dict[str, str]) -> None:
        recipe, base = self.recipe, self.run_dir.root
        self.source = PromptSource(recipe.data.train, base=base, seed=recipe.seed)
        per_step = recipe.policy.batch_size // self.algorithm.group_size
        total = (recipe.policy.steps or 0) * per_step
        if recipe.policy.epochs:
            total = recipe.policy.epochs * len(self.source)
        self.window = PromptWindow(per_step, self.algorithm.max_staleness, total)
        self.total_steps = self.window.total_steps
        mesh = self.plan.mesh
        self.packing = BatchOptions(
            data_parallel=mesh.dp_replicate * mesh.dp_shard,
            ranks_per_replica=mesh.tp * mesh.pp * mesh.cp,
            micro_batch_tokens=recipe.policy.micro_batch_tokens,
            micro_batch_size=recipe.policy.micro_batch_size,
            normalize_std=self.algorithm.normalize_std,
            aggregation=self.algorithm.loss_aggregation,
        )
        self.evaluator = self._make_evaluator(base)
        self.recorder = make_recorder(self.role, self.total_steps, restored=step)
        if step > 0:
            self.read_state(self.run_dir.checkpoint(step) / "controller", step)
        if self.evaluator.due(step, self.total_steps):
            self._await_evaluation(step)

    def _await_evaluation(self, step: int) -> None:
        """Hold the row of `step` back, and the next step too until the replicas were sent version `step`."""
        assert self.recorder is not None
        if self.recorder.written(step):
            return
        self.recorder.hold(step)
        self.awaiting = step

    def _make_evaluator(self, base: Path) -> Evaluator:
        spec = self.recipe.data.eval
        prompts = PromptSource(spec, base=base, seed=0).in_file_order() if spec else []
        return Evaluator(
            self.recipe.eval,
            prompts,
            primary=str(self.recipe.reward[0]["name"]),
            max_tokens=self.recipe.eval.max_tokens or self.rollout.max_tokens,
            seed=prompt_seed(self.recipe.seed, "eval", 0),
        )

    def write_state(self, folder: Path, step: int) -> None:
        """Cursor, answers not trained yet, evaluations done, and what data they belong to."""
        done = [group for o, group in sorted(self.window.done.items()) if o >= step * self.window.prompts_per_step]
        (folder / "buffer.msgpack").write_bytes(msgspec.msgpack.encode(done))
        state = {
            "step": step,
            "prompts_per_step": self.window.prompts_per_step,
            "fingerprint": self.source.fingerprint,
            "dropped": {str(o): reason for o, reason in self.window.dropped.items()},
            "in_flight": sorted(self.window.in_flight),
            "evaluated": sorted(s for s in self.evaluator.done_steps if s <= step),
            "versions": {r.index: r.version for r in self.members.replicas.values()},
            "held_rows": self.recorder.held_rows if self.recorder is not None else {},
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1))

    def read_state(self, folder: Path, step: int) -> None:
        state = json.loads((folder / "state.json").read_text())
        if state["fingerprint"] != self.source.fingerprint:
            raise AttemptFailed(
                f"the training data changed since the checkpoint of step {step} "
                f"(fingerprint {self.source.fingerprint}, was {state['fingerprint']}): {self.recipe.data.train.path}"
            )
        if state["prompts_per_step"] != self.window.prompts_per_step:
            raise AttemptFailed(
                f"prompts per step changed from {state['prompts_per_step']} to {self.window.prompts_per_step}: "
                "batch_size and group_size may not change on resume"
            )
        groups = msgspec.msgpack.decode((folder / "buffer.msgpack").read_bytes(), type=list[PromptGroup])
        dropped = {int(o): reason for o, reason in state["dropped"].items()}
        self.window.restore(step, groups, dropped)
        self.evaluator.done_steps = set(state["evaluated"])
        assert self.recorder is not None
        self.recorder.restore({int(s): row for s, row in state["held_rows"].items()})
        LOG.info("restored step %d: %d answers kept, %d prompts handed out again", step, len(groups), len(state["in_flight"]))

    # --- messages ---------------------------------------------------------------------------------
    def handle_other(self, message: m.Message) -> None:
        match message:
            case m.ReplicaReady():
                replica = self.members.find(message.replica, message.incarnation)
                if replica is not None:
                    LOG.info("%s ready: %s", replica.name, message.info)
                    replica.enter("loaded")
            case m.GroupDone():
                self.group_done(message)
            case m.GroupFailed():
                self.group_failed(message)
            case m.WeightsApplied():
                self.weights_applied(message)
            case m.WeightsFailed():
                replica = self.members.find(message.replica, message.incarnation)
                if replica is not None:
                    self.members.lose(replica, f"weights of version {message.version} failed: {message.cause}")
            case m.WeightsPushed():
                self.weights_pushed(message)
            case _:
                super().handle_other(message)

    def group_done(self, message: m.GroupDone) -> None:
        self.last_group = time.monotonic()
        if message.purpose == "eval":
            self.eval_answer(message)
        else:
            ordinal = message.group.prompt.ordinal
            self.window.finish(ordinal, message.replica, message.incarnation, message.group)

    def group_failed(self, message: m.GroupFailed) -> None:
        self.last_group = time.monotonic()
        if message.purpose == "eval":
            self.eval_answer(message)
        elif self.window.drop(message.ordinal, message.replica, message.incarnation, message.cause):
            LOG.warning("prompt %d dropped: %s", message.ordinal, message.cause)
            self.events.append("prompt_dropped", ordinal=message.ordinal, reason=message.cause)

    def eval_answer(self, message: m.GroupDone | m.GroupFailed) -> None:
        assert self.recorder is not None
        step = self.evaluator.current.step if self.evaluator.current else 0
        metrics = self.evaluator.answered(message)
        if metrics is not None:
            LOG.info("evaluation at step %d: accuracy %.3f", step, metrics.get("eval/accuracy", float("nan")))
            self.recorder.release(step, metrics)

    def weights_applied(self, message: m.WeightsApplied) -> None:
        """The acknowledgement: from now on this replica may start prompts of newer windows."""
        replica = self.members.find(message.replica, message.incarnation)
        if replica is None:
            return
        replica.version, replica.receiving = message.version, False
        if replica.state == "loaded":
            replica.enter("live")
        self._push_settled()

    def _push_settled(self) -> None:
        """A push is over when rank 0 said so and every receiver has acknowledged it or is lost."""
        if self.push_seconds is not None and not any(r.receiving for r in self.members.replicas.values()):
            self.pushing = None

    def weights_pushed(self, message: m.WeightsPushed) -> None:
        self.push_seconds = message.seconds
        for index, cause in message.failed.items():
            replica = self.members.replicas[int(index)]
            if replica.receiving:
                self.members.lose(replica, f"push of version {message.version}: {cause}")
        self._push_settled()

    def replica_lost(self, replica: Replica) -> None:
        self.events.append("replica_lost", index=replica.index, cause=replica.causes[-1])
        if not self.started:
            return
        self._push_settled()
        again = self.window.give_back(replica.index)
        self.evaluator.give_back(replica.index)
        LOG.warning("%s: %d prompts are handed out again", replica.name, len(again))

    # --- decisions --------------------------------------------------------------------------------
    def advance(self) -> None:
        self._accept_first_weights()
        self._begin_evaluation()
        self._push_if_useful()
        self._hand_out()
        self._train_if_ready()
        self._check_generation()

    def _accept_first_weights(self) -> None:
        """At step 0 a freshly loaded engine has the recipe's weights: that is version 0."""
        if self.step > 0 or self.commanded > 0:
            return
        for replica in self.members.replicas.values():
            if replica.state == "loaded":
                replica.version = 0
                replica.enter("live")
                self.pushed = max(self.pushed, 0)

    def _push_if_useful(self) -> None:
        """Between steps, when a replica is behind, no push is under way and no evaluation needs peace."""
        policy_idle = self.step == self.commanded
        if self.pushing or not policy_idle or self.evaluator.current is not None or self.ending_early():
            return
        needed = self.step < self.total_steps or self.awaiting == self.step
        behind = [
            r for r in self.members.replicas.values() if r.state in ("loaded", "live") and (r.version is None or r.version < self.step)
        ]
        if not behind or not needed:
            return
        for replica in behind:
            replica.receiving = True
            self.role.bus.send(m.inbox("rollout", replica.index), m.ReceiveWeights(self.step))
        self.to_policy(
            m.PushWeights(self.step, [r.index for r in behind], [r.incarnation for r in behind])
        )
        self.pushing, self.push_seconds = (self.step, time.monotonic()), None
        self.pushed = self.step

    def _hand_out(self) -> None:
        if self.ending_early():
            return
        while True:
            replica = self._least_loaded()
            if replica is None or replica.version is None:
                return
            loaded = bool(self.window.in_flight)
            request = self.evaluator.next_request(replica.index, replica.incarnation)
            if request is None:
                ordinal = self.window.admit(replica.version)
                if ordinal is None:
                    return
                self.window.hand_out(ordinal, replica.index, replica.incarnation)
                request = self._request(ordinal)
            if not loaded:
                self.last_group = time.monotonic()  # the clock of `_check_generation` starts now
            self.role.bus.send(m.inbox("rollout", replica.index), request)

    def _begin_evaluation(self) -> None:
        """Once every live replica has exactly the version that is to be evaluated."""
        if self.awaiting is None or self.pushing or self.ending_early():
            return
        if {r.version for r in self.members.replicas.values() if r.state == "live"} == {self.awaiting}:
            self.evaluator.begin(self.awaiting)
            self.awaiting = None

    def _least_loaded(self) -> Replica | None:
        """The live replica with the fewest prompt groups in flight, if it has room; newest weights first."""
        loads = dict.fromkeys(self.members.replicas, 0)
        owners = list(self.window.in_flight.values())
        if self.evaluator.current is not None:
            owners += list(self.evaluator.current.in_flight.values())
        for index, _ in owners:
            loads[index] += 1
        live = [
            r
            for r in self.members.replicas.values()
            if r.state == "live" and not r.receiving and loads[r.index] < self.rollout.max_in_flight
        ]
        return min(live, key=lambda r: (loads[r.index], -(r.version or 0), r.index), default=None)

    def _request(self, ordinal: int) -> m.Generate:
        sampling = Sampling(
            temperature=self.algorithm.temperature,
            top_p=self.algorithm.top_p,
            max_tokens=self.rollout.max_tokens,
            seed=prompt_seed(self.recipe.seed, "train", ordinal),
        )
        return m.Generate(self.source.prompt(ordinal), self.algorithm.group_size, sampling)

    def _train_if_ready(self) -> None:
        step = self.commanded + 1
        idle = self.step == self.commanded
        if idle and self.idle_since is None:
            self.idle_since = time.monotonic()
        if not idle or step > self.total_steps or self.ending or not self.window.ready(step):
            return
        if self._must_push_first():
            return
        groups, drops = self.window.take(step)
        samples = make_samples(groups, self.packing.normalize_std)
        for rank, command in enumerate(train_steps(step, samples, self.packing)):
            self.role.bus.send(m.inbox("policy", rank), command)
        waited = time.monotonic() - self.idle_since if self.idle_since else 0.0
        metrics = {**rollout_metrics(groups, step - 1), "time/policy_wait_s": waited}
        metrics["rollout/dropped"] = float(len(drops))
        metrics["rollout/in_flight"] = float(len(self.window.in_flight))
        self.batch[step] = (groups, drops, metrics)
        self.commanded, self.idle_since, self.last_progress = step, None, time.monotonic()

    def _must_push_first(self) -> bool:
        """Someone waits for just these weights: an evaluation, or a replica that has none yet."""
        if self.pushing is not None:
            return False
        if self.awaiting is not None:
            return self.awaiting == self.step > self.pushed
        waiting = any(r.state == "loaded" for r in self.members.replicas.values())
        return waiting and self.evaluator.current is None

    def step_done(self, message: m.StepDone) -> None:
        assert self.recorder is not None
        groups, drops, metrics = self.batch.pop(message.step)
        now = time.monotonic()
        metrics |= {**message.metrics, "time/train_s": message.seconds, "time/step_s": now - self.stepped}
        metrics["rollout/tokens_per_s"] = metrics.get("rollout/tokens", 0.0) / max(now - self.stepped, 1e-9)
        self.stepped = now
        self.ledger.append(
            message.step,
            [group.prompt.ordinal for group in groups],
            drops,
            rows=[group.prompt.row for group in groups],
            epochs=sorted({group.prompt.epoch for group in groups}),
            replicas=sorted({t.replica for group in groups for t in group.trajectories}),
            versions=sorted({s.version for g in groups for t in g.trajectories for s in t.spans}),
        )
        if self.evaluator.due(message.step, self.total_steps):
            if self._evaluator_free():
                self._await_evaluation(message.step)
            elif message.step == self.total_steps:
                self.recorder.hold(message.step)  # `settled` awaits it when the running one is done
        self.recorder.step(message.step, metrics)
        if self.saves.due(message.step, final=message.step == self.total_steps):
            self.saves.save(message.step)

    def _evaluator_free(self) -> bool:
        """An evaluation that is still running makes the next one fall out, except the last."""
        return self.evaluator.current is None and self.awaiting is None

    def _check_generation(self) -> None:
        """Prompts in flight that never come back end the attempt, with the replicas named."""
        waiting = dict(self.window.in_flight)
        if self.evaluator.current is not None:
            waiting |= {-1 - index: owner for index, owner in self.evaluator.current.in_flight.items()}
        if not waiting or time.monotonic() - self.last_group < GENERATE_LIMIT_S:
            return
        who = sorted({f"rollout {index}" for index, _ in waiting.values()})
        raise AttemptFailed(f"no answer for {GENERATE_LIMIT_S:.0f} s from {', '.join(who)} ({len(waiting)} prompts)")

    # --- the end ----------------------------------------------------------------------------------
    def ending_early(self) -> bool:
        return self.ending is not None and self.ending[0] != 0

    def settled(self) -> bool:
        """The last version has been evaluated (if it is to be)."""
        if self._evaluator_free() and self.evaluator.due(self.step, self.total_steps):
            self._await_evaluation(self.step)
        return self._evaluator_free()

    def tick(self) -> None:
        super().tick()
        if self.pushing is None:
            return
        version, since = self.pushing
        limit = self.rollout.weights.timeout_s + PUSH_SLACK_S
        if time.monotonic() - since > limit:
            raise AttemptFailed(f"policy rank 0 has not finished pushing version {version} after {limit:.0f} s")
