"""`RoleProcess`: the life of one role process, from its secrets to its exit cause.

    with RoleProcess(run, "rollout", 2, attempt=1, incarnation=1) as process:
        process.phase("load", limit_s=600)
        engine = load(process.recipe)
        process.register(engine="vllm")
        while ...:
            for message in process.inbox.poll(1.0): ...

An exception that leaves the `with` body is reported on the bus and in a cause file, with secrets
masked, and goes on. SIGTERM raises `RoleTerminated` in the main thread: code on the way out may flush,
but after `FLUSH_S` the process and its children are killed. SIGUSR1 dumps the stacks of all threads.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from hpc_rl.bus.client import START, Bus, Inbox
from hpc_rl.bus.errors import BusError, BusLost
from hpc_rl.bus.messages import Message, Register, RoleFailed, inbox
from hpc_rl.cluster.environment import make_cache_folders
from hpc_rl.plan import Plan, read_plan
from hpc_rl.recipe.schema import Recipe
from hpc_rl.roles.heartbeat import Heartbeat, Phase
from hpc_rl.run.events import Cause, write_cause
from hpc_rl.run.paths import RunDir
from hpc_rl.run.secrets import load_into_environ, mask
from hpc_rl.run.settings import load_run

CONNECT_S = 60.0
FLUSH_S = 4.0
EXIT_FAILED = 1
EXIT_ORPHANED = 74
_DETAIL_CHARS = 8000


class RoleTerminated(SystemExit):
    """SIGTERM came. Exit code 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class RoleProcess:
    """One process of `role`; `index` is its rank or replica, `incarnation` counts its starts.

    Attributes: `run_dir`, `role`, `index`, `attempt`, `incarnation`, `recipe`, `plan`, `bus`, `inbox`, `log`;
    `step` may be set and is shown in the heartbeat. All are ready inside the `with` body only.
    """

    recipe: Recipe
    plan: Plan
    bus: Bus
    inbox: Inbox

    def __init__(self, run_dir: RunDir, role: str, index: int, attempt: int, incarnation: int = 1) -> None:
        self.run_dir = run_dir
        self.role = role
        self.index = index
        self.attempt = attempt
        self.incarnation = incarnation
        self.step = 0
        self.log = logging.getLogger(f"hpc_rl.{role}")
        self._phase = Phase("start")
        self._parent = os.getppid()
        self._secrets: list[str] = []
        self._connected = False
        self._heartbeat: Heartbeat | None = None

    # --- what the role says ------------------------------------------------------------------------
    def send(self, *messages: Message) -> None:
        """To the controller. Raises BusLost."""
        self.bus.send(inbox("controller"), *messages)

    def register(self, **info: str) -> None:
        """Tell the controller that this process reads its inbox."""
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.send(
            Register(
                role=self.role,
                index=self.index,
                incarnation=self.incarnation,
                pid=os.getpid(),
                node=node,
                host=socket.gethostname(),
                info={key: str(value) for key, value in info.items()},
            )
        )

    def phase(self, name: str, limit_s: float | None = None) -> None:
        """Say what the process is doing now (start, load, generate, step, save, idle, ...).

        The controller ends the attempt, or the replica, when a phase lasts longer than its `limit_s`.
        """
        self._phase = Phase(name, limit_s)

    @contextmanager
    def within(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        """`phase(name)` for a block; afterwards the earlier phase starts anew.

        After an exception it stays, so that the cause names what was being done.
        """
        before = self._phase
        self._phase = Phase(name, limit_s)
        yield
        self._phase = Phase(before.name, before.limit_s)  # its time is that since the block

    # --- life --------------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        self._set_up_process()
        try:
            self._connect()
        except BaseException as error:
            self._report(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._report(error)
        if self._heartbeat is not None:
            self._heartbeat.stop()
        if self._connected:
            self.bus.close()
        if os.getppid() != self._parent:
            self._end_now(EXIT_ORPHANED)

    def _set_up_process(self) -> None:
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)
            signal.signal(signal.SIGINT, self._on_sigterm)
            # The walltime warning is for the supervisor; a site may send it to every step as well.
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        logging.basicConfig(
            level=logging.INFO,
            stream=sys.stdout,
            format=f"%(asctime)s %(levelname)s {self.role} {self.index}: %(message)s",
            datefmt="%H:%M:%S",
            force=True,
        )

    def _connect(self) -> None:
        self.recipe = load_run(self.run_dir)
        self._secrets = load_into_environ(self.run_dir, self.recipe.cluster.secrets)
        make_cache_folders(os.environ)
        self.plan = read_plan(self.run_dir.plan)
        load_run(self.run_dir, plugins=True)  # after the secrets: a plugin may need them
        self.bus = Bus.connect(self.run_dir.bus_file(self.attempt), CONNECT_S)
        self._connected = True
        stream = inbox(self.role, self.index)
        # What was sent to an earlier incarnation is not for this one.
        self.inbox = Inbox(
            self.bus, stream, cursor=START if self.incarnation == 1 else self.bus.end_of(stream)
        )
        self._heartbeat = Heartbeat(
            self.bus, self.role, self.index, self.incarnation, self._payload, self._orphaned
        )
        self._heartbeat.start()

    def _payload(self) -> dict[str, Any]:
        phase = self._phase
        return {
            "time": time.time(),
            "phase": phase.name,
            "phase_since": phase.since,
            "limit_s": phase.limit_s,
            "step": self.step,
            "pid": os.getpid(),
            "incarnation": self.incarnation,
        }

    # --- the end -----------------------------------------------------------------------------------
    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        timer = threading.Timer(FLUSH_S, self._end_now, (128 + signal.SIGTERM,))
        timer.daemon = True
        timer.start()
        raise RoleTerminated

    def _orphaned(self, cause: str) -> None:
        self.log.error("%s; this process ends", cause)
        faulthandler.dump_traceback(all_threads=True)
        self._write(Cause(time.time(), self.role, self.index, cause, self._phase.name, EXIT_ORPHANED))
        self._end_now(EXIT_ORPHANED)

    def _report(self, error: BaseException) -> None:
        """Leave the cause on disk, then on the bus. Leaving on purpose (SystemExit) is no failure."""
        if isinstance(error, (SystemExit, GeneratorExit)):
            return
        words = str(error).strip().splitlines() or ["(no message)"]
        cause = mask(f"{type(error).__name__}: {words[0]}"[:500], self._secrets)
        detail = mask("".join(traceback.format_exception(error))[-_DETAIL_CHARS:], self._secrets)
        now = time.time()
        self.log.error("failed in phase %s: %s\n%s", self._phase.name, cause, detail)
        self._write(Cause(now, self.role, self.index, cause, self._phase.name, EXIT_FAILED, detail))
        if self._connected and self.role != "controller" and not isinstance(error, BusLost):
            failed = RoleFailed(
                role=self.role,
                index=self.index,
                incarnation=self.incarnation,
                time=now,
                phase=self._phase.name,
                cause=cause,
                detail=detail,
                exit_code=EXIT_FAILED,
            )
            try:
                self.send(failed)
            except BusError as lost:
                self.log.error("the controller could not be told: %s", lost)

    def _write(self, cause: Cause) -> None:
        try:
            write_cause(self.run_dir, self.attempt, cause)
        except OSError as error:  # a full or lost filesystem must not hide the failure itself
            self.log.error("the cause could not be written: %s", error)

    def _end_now(self, code: int) -> None:
        """End at once. Nobody is left to clear up after an orphan, so it takes its children with it."""
        sys.stdout.flush()
        if os.getppid() != self._parent and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(code)
