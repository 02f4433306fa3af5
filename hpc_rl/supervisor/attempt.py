"""One attempt: Redis, the controller and the steps it asks for, watched until the end.

The loop blocks on the supervisor's inbox for `TICK_S` and then looks at its children, its flags and its
deadlines. It decides nothing about roles: the controller asks and is told. A lost Redis is restarted a
few times; a lost controller ends the attempt.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hpc_rl.bus.client import Bus, Inbox
from hpc_rl.bus.errors import BusError, BusLost
from hpc_rl.bus.messages import Interrupt, Message, StartRole, StepExited, StepStarted, StopRole, inbox
from hpc_rl.roles.heartbeat import end_key
from hpc_rl.run.events import EventLog, cause_file, clear_cause
from hpc_rl.run.lock import RunLock
from hpc_rl.run.paths import RunDir
from hpc_rl.run.process import describe_exit, exit_code
from hpc_rl.supervisor.launchers import Launcher
from hpc_rl.supervisor.redis import KeptRedis
from hpc_rl.supervisor.signals import Signals
from hpc_rl.supervisor.steps import Step, exit_words, spawn

LOG = logging.getLogger("hpc_rl.supervisor")
EXIT_DONE, EXIT_REQUEUE, EXIT_STOPPED, EXIT_TERM, EXIT_FAILED = 0, 75, 93, 143, 1
TICK_S = 0.2
REFRESH_S = 10.0
# A controller without a heartbeat for this long is hung (its heartbeat is a thread of its own).
CONTROLLER_SILENT_S = 40.0
REDIS_SILENT_S = 10.0
STOP_GRACE_S = 5.0
# What is left of the warning time for ending the steps and the requeue itself.
WALLTIME_MARGIN_S = 20.0


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `reason` as in `run.attempts.Attempt`."""

    code: int
    reason: str


@dataclass
class Stopping:
    """A step that was asked to end: when it is killed, and whether because it seemed lost."""

    kill_at: float
    lost: bool

    def did_it(self, code: int) -> bool:
        """Whether `code` is our doing: a lost replica may have been killed before it was asked."""
        by_signal = code > 128 and code != 128 + signal.SIGTERM
        return not (self.lost and by_signal and time.monotonic() < self.kill_at)


class AttemptLoop:
    """Runs one attempt. `run()` gives the outcome; nothing of the attempt is alive afterwards.

    `controller` is the controller's command, `secrets` are values to keep out of the events,
    `warning_s` is how long before the walltime USR2 comes, `term_grace_s` what SIGTERM leaves us, and
    `on_term` is called first after SIGTERM.
    """

    def __init__(
        self,
        run: RunDir,
        attempt: int,
        *,
        redis: KeptRedis,
        launcher: Launcher,
        controller: Sequence[str],
        controller_env: Mapping[str, str],
        secrets: Sequence[str],
        signals: Signals,
        lock: RunLock,
        events: EventLog,
        warning_s: float,
        term_grace_s: float,
        on_term: Callable[[], object],
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._redis = redis
        self._launcher = launcher
        self._controller_argv = controller
        self._controller_env = controller_env
        self._controller_log = run.attempt_logs(attempt) / "controller.log"
        self._secrets = secrets
        self._signals = signals
        self._lock = lock
        self._events = events
        self._warning_s = warning_s
        self._term_grace_s = term_grace_s
        self._on_term = on_term
        self._steps: dict[tuple[str, int], Step] = {}
        self._stopping: dict[tuple[str, int], Stopping] = {}
        self._waiting: dict[tuple[str, int], StartRole] = {}
        self._outbox: list[Message] = []
        self._bus: Bus | None = None
        self._inbox: Inbox | None = None
        self._controller: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._refreshed = 0.0
        self._bus_lost_since: float | None = None
        self._warned_until: float | None = None

    def run(self) -> Outcome:
        """Raises RedisMissing, RedisFailed, BusError, LockLost or OSError when it cannot go on."""
        try:
            self._redis.start()
            # Redis is our child: what is wrong with it we see ourselves, at once.
            self._bus = Bus.connect(
                self._run.bus_file(self._attempt), 10.0, reconnect_s=0.0, socket_timeout_s=3.0
            )
            self._inbox = Inbox(self._bus, inbox("supervisor"))
            self._start_controller()
            return self._loop()
        finally:
            self._tear_down()

    # --- the loop ----------------------------------------------------------------------------------
    def _loop(self) -> Outcome:
        while True:
            if self._signals.term:
                return self._terminated()
            if self._signals.walltime and self._warned_until is None:
                self._warn_of_walltime()
            if self._warned_until is not None and time.time() > self._warned_until:
                self._events.append("walltime", words="the controller did not finish saving in time")
                return Outcome(EXIT_REQUEUE, "requeue")
            for message in self._receive():
                self._obey(message)
            self._look_at_steps()
            if self._redis.ended:
                self._redis.mend()
            outcome = self._look_at_controller()
            if outcome is not None:
                return outcome
            self._now_and_then()

    def _receive(self) -> list[Message]:
        """Messages of the next `TICK_S`; a Redis that is away for long is restarted by force."""
        assert self._bus is not None
        assert self._inbox is not None
        try:
            if self._outbox:
                self._bus.send(inbox("controller"), *self._outbox)
                self._outbox.clear()
            messages = self._inbox.poll(TICK_S)
        except BusLost as error:
            now = time.monotonic()
            self._bus_lost_since = self._bus_lost_since or now
            if not self._redis.ended and now - self._bus_lost_since > REDIS_SILENT_S:
                self._redis.mend(f"Redis runs but does not answer: {error}")
                self._bus_lost_since = None
            time.sleep(TICK_S)
            return []
        self._bus_lost_since = None
        return messages

    def _obey(self, message: Message) -> None:
        match message:
            case StartRole():
                self._start_step(message)
            case StopRole():
                self._stop_step(message)
            case _:
                LOG.warning("the supervisor has no use for %s", type(message).__name__)

    def _now_and_then(self) -> None:
        now = time.monotonic()
        if now - self._refreshed < REFRESH_S:
            return
        self._refreshed = now
        self._lock.refresh()

    # --- steps -------------------------------------------------------------------------------------
    def _start_step(self, wanted: StartRole) -> None:
        key = (wanted.role, wanted.index)
        if key in self._stopping:  # as soon as the earlier incarnation is gone
            self._waiting[key] = wanted
            return
        if key in self._steps:
            LOG.error("%s %d is asked for but runs already", *key)
            self._events.append("start_refused", role=wanted.role, index=wanted.index)
            return
        if wanted.incarnation > 1:
            clear_cause(self._run, self._attempt, *key)
        try:
            step = self._launcher.start(wanted.role, wanted.index, wanted.incarnation)
        except (OSError, ValueError) as error:
            self._events.failure(wanted.role, f"could not be started: {error}", index=wanted.index)
            self._outbox.append(StepExited(*key, wanted.incarnation, 127, time.time()))
            return
        self._steps[key] = step
        LOG.info("started %s %d (incarnation %d): %s", *key, wanted.incarnation, " ".join(step.argv))
        self._events.append("step_launched", role=step.role, index=step.index, incarnation=step.incarnation)
        self._outbox.append(StepStarted(*key, wanted.incarnation, time.time()))

    def _stop_step(self, wanted: StopRole) -> None:
        key = (wanted.role, wanted.index)
        self._waiting.pop(key, None)
        if key not in self._steps:
            return
        LOG.info("stopping %s %d: %s", *key, wanted.reason)
        self._stopping[key] = Stopping(time.monotonic() + wanted.grace_s, wanted.lost)
        self._ask_to_end(self._steps[key])

    def _ask_to_end(self, step: Step) -> None:
        """SIGTERM to the tasks: directly, and by a word on the bus that their heartbeat threads look for."""
        assert self._bus is not None
        step.terminate()
        try:
            self._bus.set_value(end_key(step.role, step.index), str(step.incarnation).encode())
        except BusLost as error:
            LOG.warning("%s %d cannot be asked to end: %s", step.role, step.index, error)

    def _look_at_steps(self) -> None:
        for key, stopping in self._stopping.items():
            if time.monotonic() > stopping.kill_at:
                self._steps[key].kill()
        for key, step in list(self._steps.items()):
            code = step.poll()
            if code is None:
                continue
            del self._steps[key]
            ending = self._stopping.pop(key, None)
            asked = ending is not None and ending.did_it(code)
            LOG.info("%s %d ended with %s", *key, describe_exit(code))
            if code != 0 and not asked and not self._has_cause(step):
                words = exit_words(code, step.logs, self._secrets)
                self._events.failure(step.role, words, index=step.index, exit_code=code)
            self._outbox.append(StepExited(*key, step.incarnation, code, time.time()))
            if key in self._waiting:
                self._start_step(self._waiting.pop(key))

    def _has_cause(self, step: Step) -> bool:
        """Whether a process of the step left its own cause, which says more than an exit code."""
        if step.role == "rollout":
            return cause_file(self._run, self._attempt, step.role, step.index).exists()
        return any(self._run.attempt_logs(self._attempt).glob(f"cause_{step.role}_*.json"))

    # --- the controller ----------------------------------------------------------------------------
    def _start_controller(self) -> None:
        self._controller = spawn(
            self._controller_argv, self._controller_log, self._controller_env, self._run.root
        )
        self._started = time.time()
        self._events.append("controller_started", pid=self._controller.pid)

    def _look_at_controller(self) -> Outcome | None:
        assert self._controller is not None
        returncode = self._controller.poll()
        if returncode is None:
            return self._controller_hung()
        code = exit_code(returncode)
        LOG.info("the controller ended with %s", describe_exit(code))
        known = {EXIT_DONE: "done", EXIT_REQUEUE: "requeue", EXIT_STOPPED: "stopped", EXIT_TERM: "cancelled"}
        if code in known:
            return Outcome(code, known[code])
        if not cause_file(self._run, self._attempt, "controller", 0).exists():
            words = exit_words(code, [self._controller_log], self._secrets)
            self._events.failure("controller", words, exit_code=code)
        return Outcome(code, "failed")

    def _controller_hung(self) -> Outcome | None:
        """A controller whose heartbeat stopped is asked for its stacks and killed."""
        assert self._bus is not None
        assert self._controller is not None
        latest = max(self._started, self._redis.mended_at)
        if self._bus_lost_since is not None or time.time() - latest < CONTROLLER_SILENT_S:
            return None
        try:
            beat = self._bus.heartbeats().get(("controller", 0), {})
        except BusError:
            return None  # the next `_receive` deals with it
        silent = time.time() - max(latest, float(beat.get("time", 0.0)))
        if silent < CONTROLLER_SILENT_S:
            return None
        self._events.failure("controller", f"gave no heartbeat for {silent:.0f} s; it was killed")
        self._controller.send_signal(signal.SIGUSR1)  # dumps its stacks to controller.log
        time.sleep(0.5)
        return Outcome(EXIT_FAILED, "failed")

    # --- signals -----------------------------------------------------------------------------------
    def _warn_of_walltime(self) -> None:
        self._warned_until = time.time() + max(self._warning_s - WALLTIME_MARGIN_S, self._warning_s / 2)
        LOG.warning("walltime (SIGUSR2): the controller saves and the job is requeued")
        self._events.append("interrupt", interrupt="walltime")
        self._outbox.append(Interrupt("walltime", self._warned_until))

    def _terminated(self) -> Outcome:
        """SIGTERM: everyone flushes for a bounded time. Slurm has told the steps by itself."""
        assert self._bus is not None
        assert self._controller is not None
        deadline = time.monotonic() + self._term_grace_s
        self._on_term()
        LOG.warning("SIGTERM: everything ends within %.0f s", self._term_grace_s)
        self._events.append("interrupt", interrupt="term")
        try:
            self._bus.send(inbox("controller"), Interrupt("term", time.time() + self._term_grace_s))
        except BusLost as error:
            LOG.warning("the controller could not be told: %s", error)
        for step in self._steps.values():
            self._ask_to_end(step)
        while time.monotonic() < deadline and (self._controller.poll() is None or self._alive_steps()):
            time.sleep(0.05)
        return Outcome(EXIT_TERM, "cancelled")

    # --- the end -----------------------------------------------------------------------------------
    def _tear_down(self) -> None:
        """SIGTERM to all, SIGKILL to what is left after a grace, then Redis goes."""
        deadline = time.monotonic() + (0.5 if self._signals.term else STOP_GRACE_S)
        if self._alive_steps():
            LOG.info("ending %s", ", ".join(f"{role} {index}" for role, index in self._steps))
            if not self._signals.term:
                for step in self._steps.values():
                    self._ask_to_end(step)
        controller = self._controller
        if controller is not None and controller.poll() is None and not self._signals.term:
            controller.terminate()
        while time.monotonic() < deadline and (
            self._alive_steps() or (controller is not None and controller.poll() is None)
        ):
            time.sleep(0.05)
        for step in self._steps.values():
            step.kill()
        if controller is not None:
            if controller.poll() is None:
                controller.kill()
            controller.wait()
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and self._alive_steps():
            time.sleep(0.02)
        if self._bus is not None:
            self._bus.close()
        self._redis.stop()

    def _alive_steps(self) -> bool:
        for key, step in list(self._steps.items()):
            if step.poll() is not None:
                del self._steps[key]
        return bool(self._steps)
