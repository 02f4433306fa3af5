"""The policy's command loop: one message after the other, the same on every rank.

The controller writes the same sequence of commands to each rank's inbox, so collectives pair up without
any further agreement. Rank 0 answers; the other ranks only say that they are ready and that they stop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

from hpc_rl.bus import messages as m
from hpc_rl.checkpoint.evaluated import use_checkpoint
from hpc_rl.policy.trainer import Trainer, TrainerContext, make_trainer
from hpc_rl.roles import RoleProcess
from hpc_rl.telemetry.console import Pace, step_line
from hpc_rl.weights.protocol import PushResult, Sender, drain
from hpc_rl.weights.transports import make_sender

LOAD_LIMIT_S = 3600.0
STEP_LIMIT_S = 3600.0
EVAL_LIMIT_S = 3600.0
SAVE_LIMIT_S = 1800.0
PUSH_SLACK_S = 60.0
IDLE_POLL_S = 0.5
BUSY_POLL_S = 0.05


class PolicyLoop:
    """Runs one rank until `Stop`."""

    def __init__(self, role: RoleProcess) -> None:
        self.role, self.rank = role, role.index
        self.world_size = role.plan.mesh.world_size
        self.weights = role.recipe.rollout.weights if role.recipe.rollout is not None else None
        self.context = TrainerContext(
            recipe=role.recipe,
            plan=role.plan,
            run_dir=role.run_dir,
            rank=self.rank,
            world_size=self.world_size,
            attempt=role.attempt,
            incarnation=role.incarnation,
            bus_file=role.run_dir.bus_file(role.attempt),
            log=role.log,
        )
        self.trainer: Trainer = make_trainer(self.context)
        self._sender: Sender | None = None
        self._pace = Pace()
        self._writing = 0  # on rank 0: checkpoints and exports whose end has not been reported

    def run(self) -> None:
        role = self.role
        role.register()
        role.phase("load", LOAD_LIMIT_S)
        began = time.monotonic()
        use_checkpoint(role.recipe, role.run_dir, self.rank, LOAD_LIMIT_S)
        step = self.trainer.load()
        role.step = step
        role.log.info("loaded in %.1f s at step %d: %s", time.monotonic() - began, step, self.trainer.info())
        for note in role.plan.notes if self.rank == 0 else ():
            role.log.info("%s", note)
        role.send(m.PolicyReady(self.rank, step, self.trainer.info()))
        role.phase("idle")
        while True:
            for message in role.inbox.poll(BUSY_POLL_S if self._writing else IDLE_POLL_S):
                if isinstance(message, m.Stop):
                    self._stop(message)
                    return
                self._handle(message)
                self._poll()
            self._poll()

    def _poll(self) -> None:
        """What ended in the background; a push that failed there ends this process."""
        self._report(self.trainer.poll())
        if self._sender is not None:
            self._sender.check()

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self.trainer.close()

    def _handle(self, message: m.Message) -> None:
        match message:
            case m.TrainStep():
                self._train(message)
            case m.PushWeights():
                self._push(message)
            case m.SaveCheckpoint():
                self._save(message)
            case m.ExportModel():
                self._export(message)
            case m.EvalLoss():
                self._evaluate(message)
            case _:
                raise AssertionError(f"the policy has no use for {type(message).__name__}")

    def _train(self, message: m.TrainStep) -> None:
        began = time.monotonic()
        with self.role.within("step", STEP_LIMIT_S):
            metrics = self.trainer.train_step(message)
        seconds = time.monotonic() - began
        self.role.step = message.step
        if self.rank == 0:
            row = {**metrics, "step": message.step, "time/step_s": seconds}
            total = self.trainer.total_steps or None
            self.role.log.info("%s", step_line(row, total, self._pace.step(message.step, total)))
            self.role.send(m.StepDone(message.step, seconds, metrics))

    def _evaluate(self, message: m.EvalLoss) -> None:
        began = time.monotonic()
        with self.role.within("evaluate", EVAL_LIMIT_S):
            metrics = self.trainer.evaluate(message.step)
        if self.rank == 0:
            self.role.send(m.EvalDone(message.step, time.monotonic() - began, metrics))

    def _push(self, message: m.PushWeights) -> None:
        """Gather the weights; whether they have left when this returns is the sender's business."""
        assert self.weights is not None, "a run without rollouts was told to push weights"
        source = self.trainer.source()
        # A push before this one may still be under way: both have the deadline of the recipe.
        with self.role.within("sync", 2 * self.weights.timeout_s + PUSH_SLACK_S):
            if self.rank != 0:
                drain(source, self.weights.bucket_mb << 20)
                return
            began = time.monotonic()
            replicas = len(message.replicas)
            done = partial(self._pushed, replicas)
            self._get_sender().start(message.version, source, message.replicas, message.incarnations, done)
            self.role.log.info("version %d: gathered in %.3f s", message.version, time.monotonic() - began)

    def _pushed(self, replicas: int, result: PushResult) -> None:
        """Tell the controller at once, from the sender's thread: a step may be under way for long."""
        self.role.log.info(
            "version %d: pushed %d tensors, %.3f MB, to %d replicas in %.2f s",
            result.version,
            result.tensors,
            result.nbytes / 1e6,
            replicas - len(result.failed),
            result.seconds,
        )
        failed = {str(replica): reason for replica, reason in result.failed.items()}
        self.role.send(m.WeightsPushed(result.version, result.seconds, result.nbytes, failed))

    def _get_sender(self) -> Sender:
        if self._sender is None:
            assert self.context.bus_file is not None
            self._sender = make_sender(
                self.role.recipe, self.role.plan, self.context.bus_file, self.role.attempt
            )
        return self._sender

    def _save(self, message: m.SaveCheckpoint) -> None:
        folder = self.role.run_dir.checkpoint(message.step) / "policy"
        with self.role.within("save", SAVE_LIMIT_S):
            stall = self.trainer.stage_checkpoint(message.step, folder, message.sync)
        if self.rank == 0:
            self._writing += 1
            self.role.send(m.CheckpointStaged(message.step, stall))

    def _export(self, message: m.ExportModel) -> None:
        with self.role.within("export", SAVE_LIMIT_S):
            self.trainer.export(message.step, message.label, self.role.run_dir.safetensors / message.label)
        if self.rank == 0:
            self._writing += 1

    def _report(self, results: Iterable[m.CheckpointSaved | m.ModelExported]) -> None:
        for result in results:
            self._writing = max(0, self._writing - 1)
            if result.error:
                self.role.log.error("%s", result)
            elif isinstance(result, m.CheckpointSaved):
                folder = self.role.run_dir.checkpoint(result.step)
                self.role.log.info("checkpoint of step %d on disk: %s", result.step, folder)
            else:
                self.role.log.info("export of step %d finished: %s", result.step, result.path)
            if self.rank == 0:
                self.role.send(result)

    def _stop(self, message: m.Stop) -> None:
        with self.role.within("stop", SAVE_LIMIT_S):
            if self._sender is not None:
                self._sender.wait()  # no longer than `rollout.weights.timeout_s`
            self._report(self.trainer.finish())
        self.role.log.info("stopped: %s", message.reason)
        self.role.send(m.RoleStopped("policy", self.rank))


def body(role: RoleProcess) -> int:
    """What `python -m hpc_rl.policy` runs."""
    loop = PolicyLoop(role)
    try:
        loop.run()
    finally:
        loop.close()
    return 0
