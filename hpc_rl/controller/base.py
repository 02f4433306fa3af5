"""The controller's loop, shared by SFT and RL: messages in, decisions out, deadlines, the end.

`Controller` owns what every kind of run has: the members, saves and exports, metrics, interrupts. A subclass
adds what it trains on (`sft.py`, `rl.py`) by filling in the hooks below. One thread; nothing here
waits: each message and each tick may start something and returns.

Exit codes: 0 done, 75 requeue (walltime), 93 stopped by the user with a save, 143 after SIGTERM; others:
failed.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from pathlib import Path

from hpc_rl.bus import messages as m
from hpc_rl.controller.members import AttemptFailed, Members, Replica
from hpc_rl.controller.recorder import Recorder
from hpc_rl.controller.saves import LastSaveFailed, Saves
from hpc_rl.controller.uploads import Uploads
from hpc_rl.plan.groups import SCORING_ROLES
from hpc_rl.roles import RoleProcess
from hpc_rl.run.events import EventLog

LOG = logging.getLogger("hpc_rl.controller")
EXIT_REQUEUE, EXIT_STOPPED, EXIT_TERM = 75, 93, 143
TICK_S, STOP_LIMIT_S = 1.0, 60.0
STEP_LIMIT_S = 3600.0


class Controller(ABC):
    """Runs one attempt. `run()` returns the exit code or raises AttemptFailed."""

    replicas = 0
    usual_metric = "eval/loss"  # what the best checkpoint is chosen by, if the recipe says nothing

    def __init__(self, role: RoleProcess) -> None:
        self.role, self.recipe, self.plan, self.run_dir = role, role.recipe, role.plan, role.run_dir
        self.events = EventLog(self.run_dir, role.attempt)
        self.world_size = self.plan.mesh.world_size if self.recipe.has_policy else 0
        self.members = Members(
            world_size=self.world_size,
            replicas=self.replicas,
            send=lambda message: role.bus.send(m.inbox("supervisor"), message),
            on_lost=self.replica_lost,
            scoring={group.role: group.tasks for group in self.plan.groups if group.role in SCORING_ROLES},
        )
        self.uploads = Uploads(self.run_dir, self.recipe.checkpoint, role.attempt, self.events.append)
        self.saves = Saves(
            self.run_dir,
            self.recipe.checkpoint,
            command=self.to_policy,
            write_state=self.write_state,
            tell=self.events.append,
            uploads=self.uploads,
            best_mode=self.recipe.eval.best_mode,
        )
        self.best_metric = self.recipe.eval.best or self.usual_metric
        self.recorder: Recorder | None = None
        self.total_steps = 0
        self.step = 0  # done by the policy
        self.commanded = 0  # sent to the policy
        self.last_progress = time.monotonic()
        self.started = False
        self.ending: tuple[int, str] | None = None  # (exit code, reason): no new steps, save, stop
        self.stop_sent: float | None = None
        self.gone: set[tuple[str, int]] = set()
        self.poll_s = TICK_S / 5  # how long the loop waits for messages
        self._ticked = 0.0

    # --- hooks of the kinds -----------------------------------------------------------------------
    @abstractmethod
    def begin(self, step: int, info: dict[str, str]) -> None:
        """All policy ranks are ready after `step` steps: set totals, restore state, command on."""

    @abstractmethod
    def step_done(self, message: m.StepDone) -> None:
        """Rank 0 finished a step; record it and decide what comes next."""

    @abstractmethod
    def advance(self) -> None:
        """Called after each batch of messages and each tick: start whatever can start."""

    def write_state(self, folder: Path, step: int) -> None:
        """The controller's part of the checkpoint of `step`."""
        (folder / "state.json").write_text(json.dumps({"step": step}))

    def replica_lost(self, replica: Replica) -> None:
        """Take back what a lost replica was doing."""
        return None  # SFT has none

    def handle_other(self, message: m.Message) -> None:
        raise AssertionError(f"the controller has no use for {type(message).__name__}")

    def settled(self) -> bool:
        """True when nothing of the kind's own (an evaluation) is pending at the end."""
        return True

    # --- the loop ---------------------------------------------------------------------------------
    def run(self) -> int:
        self.members.start_all()
        self.role.phase("start")
        while True:
            for message in self.role.inbox.poll(self.poll_s):
                self.handle(message)
            if time.monotonic() - self._ticked >= TICK_S:
                self._ticked = time.monotonic()
                self.tick()
            if self.started and self.stop_sent is None:
                self.advance()
                self.finish_if_done()
            if self.stop_sent is not None and self.all_gone() and self.uploads.settled():
                assert self.ending is not None
                return self.ending[0]

    def handle(self, message: m.Message) -> None:
        match message:
            case m.Register():
                self.members.registered(message)
            case m.RoleFailed():
                self.members.failed(message)
            case m.StepStarted():
                self.gone.discard((message.role, message.index))
                self.events.append("step_started", role=message.role, index=message.index)
            case m.StepExited():
                self.gone.add((message.role, message.index))
                self.events.append("step_exited", role=message.role, index=message.index, code=message.code)
                self.members.exited(message)
            case m.RoleStopped():
                pass  # its StepExited follows and counts
            case m.Interrupt():
                self.interrupt(message.kind)
            case m.PolicyReady():
                self.policy_ready(message)
            case m.StepDone():
                self.step, self.last_progress = message.step, time.monotonic()
                self.step_done(message)
            case m.CheckpointStaged():
                LOG.info("checkpoint of step %d staged in %.3f s", message.step, message.seconds)
            case m.CheckpointSaved():
                self.saves.saved(message)
            case m.ModelExported():
                self.saves.exported(message)
            case _:
                self.handle_other(message)

    def policy_ready(self, message: m.PolicyReady) -> None:
        self.members.policy_ranks.add(message.rank)
        if message.rank == 0:
            self._ready = message
        if len(self.members.policy_ranks) < self.world_size or self.started:
            return
        self.step = self.commanded = self._ready.step
        self.saves.restored(self.step)
        self.last_progress = time.monotonic()
        self.begin(self.step, self._ready.info)
        if self.step > 0:
            self.uploads.written(f"checkpoints/{self.run_dir.checkpoint(self.step).name}")
        self.saves.best.restore(self.step, self.best_metric)
        self.started = True
        self.events.append("training", step=self.step, total_steps=self.total_steps)
        LOG.info("policy ready: %d ranks, step %d of %d", self.world_size, self.step, self.total_steps)
        self.role.phase("train")

    def tick(self) -> None:
        """Once a second: liveness, deadlines, what the command line asks."""
        self.members.check(self.role.bus.heartbeats())
        request = self.run_dir.control / "stop.json"
        if request.is_file() and self.ending is None:
            self.interrupt("save_and_stop")
            request.unlink(missing_ok=True)
        self.uploads.poll()
        overdue = self.saves.overdue()
        if overdue:
            raise AttemptFailed(overdue)
        waiting = self.step < self.commanded and self.stop_sent is None
        if waiting and time.monotonic() - self.last_progress > STEP_LIMIT_S:
            raise AttemptFailed(f"the policy has not finished step {self.step + 1} in {STEP_LIMIT_S:.0f} s")
        late = self.stop_sent is not None and time.monotonic() - self.stop_sent > STOP_LIMIT_S
        if late and not self.all_gone():
            LOG.warning("still running %.0f s after Stop: %s", STOP_LIMIT_S, self.still_here())
            for role, index in self.still_here():
                self.gone.add((role, index))  # the supervisor ends them with the attempt

    def interrupt(self, kind: str) -> None:
        """USR2 (walltime) and `cancel --save` end the run at the step boundary; SIGTERM at once."""
        LOG.warning("interrupt: %s", kind)
        self.events.append("interrupt", interrupt=kind, step=self.step)
        if kind == "term":
            if self.recorder is not None:
                self.recorder.flush()
            raise SystemExit(EXIT_TERM)
        if self.stop_sent is not None:  # what is left are uploads
            self.uploads.give_up(kind)
        code = EXIT_REQUEUE if kind == "walltime" else EXIT_STOPPED
        self.ending = self.ending or (code, kind)

    # --- commands and the end ---------------------------------------------------------------------
    def to_policy(self, message: m.Message) -> None:
        for rank in range(self.world_size):
            self.role.bus.send(m.inbox("policy", rank), message)

    def finish_if_done(self) -> None:
        """Stop everyone once the last step is saved, exported and evaluated (or after an interrupt)."""
        finished = self.step >= self.total_steps
        if self.step < self.commanded or not (finished or self.ending):
            return
        saved = self.saved_at_the_end()
        if finished and self.ending is None:
            if self.recipe.checkpoint.export != "off":
                self.saves.export(self.step, "final")
            self.ending = (0, "done")
        if (
            not saved
            or self.saves.busy
            or (self.ending is not None and self.ending[0] == 0 and not self.settled())
        ):
            return
        self.stop_everyone()

    def saved_at_the_end(self) -> bool:
        """Whether the last state is on disk, or nothing more can be done about it.

        Raises AttemptFailed for a run that would be called done: the next attempt trains on from the newest
        checkpoint and tries again. At walltime the next attempt does that anyway; after `cancel --save`
        nobody may requeue, and `status` says that the save failed.
        """
        try:
            return self.saves.conclude(self.step)
        except LastSaveFailed as error:
            if self.ending is None or self.ending[0] == 0:
                raise AttemptFailed(str(error)) from error
            LOG.critical("%s", error)
            if self.ending[0] == EXIT_STOPPED:
                self.events.failure("controller", str(error))
            return True

    def stop_everyone(self) -> None:
        assert self.ending is not None
        LOG.info("stopping: %s at step %d of %d", self.ending[1], self.step, self.total_steps)
        self.saves.tidy()
        if self.saves.best.best is not None:
            step = self.saves.best.best.step
            LOG.info("best checkpoint: %s: %s", self.saves.best.best, self.run_dir.checkpoint(step))
        self.events.append("stopping", reason=self.ending[1], step=self.step)
        self.members.stopping = True
        self.stop_sent = time.monotonic()
        self.to_policy(m.Stop(self.ending[1]))
        for replica in self.members.everyone():
            self.role.bus.send(m.inbox(replica.role, replica.index), m.Stop(self.ending[1]))
        if self.ending[0] == 0 and self.uploads.enabled:
            self.uploads.finish()
            self.role.phase("upload")
        # Rows held back for an evaluation are in the checkpoint; after the last one nothing may stay back.
        if self.recorder is not None and (self.ending[0] == 0 or not self.recipe.checkpoint.enabled):
            self.recorder.flush()

    def still_here(self) -> list[tuple[str, int]]:
        running = [(r.role, r.index) for r in self.members.everyone() if r.state != "lost"]
        expected = [("policy", 0), *running] if self.world_size else running
        return [who for who in expected if who not in self.gone]

    def all_gone(self) -> bool:
        return not self.still_here()
