"""`supervise(run_dir)`: what submitit's one task runs in the batch step, and `local` in a session of its own.

Takes the run's lock, opens the next attempt, runs it, writes how it ended, and requeues the job for
exit code 75 (without Slurm: goes on with the next attempt by itself). Errors before an attempt is open
are one line on stderr.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from hpc_rl.bus.errors import BusError
from hpc_rl.cluster.slurm import watcher
from hpc_rl.cluster.slurm.commands import SlurmError
from hpc_rl.plan import read_plan
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.attempts import (
    Attempt,
    close_attempt,
    latest_job,
    open_attempt,
    read_attempts,
    requeues_without_progress,
)
from hpc_rl.run.events import EventLog, first_cause
from hpc_rl.run.lock import LockHeld, LockLost, RunLock
from hpc_rl.run.paths import RunDir
from hpc_rl.run.secrets import read_secrets
from hpc_rl.run.settings import load_run
from hpc_rl.supervisor.allocation import Allocation, bus_hosts, current_allocation
from hpc_rl.supervisor.attempt import (
    EXIT_FAILED,
    EXIT_REQUEUE,
    EXIT_STOPPED,
    EXIT_TERM,
    LOG,
    AttemptLoop,
    Outcome,
)
from hpc_rl.supervisor.launchers import (
    MODULES,
    Environments,
    Launcher,
    LocalLauncher,
    SlurmLauncher,
    role_command,
)
from hpc_rl.supervisor.redis import KeptRedis
from hpc_rl.supervisor.signals import Signals
from hpc_rl.telemetry.run_report import write_run_report

# Without Slurm nobody else bounds how often a run resumes itself.
LOCAL_RESUMES = 20
# So many walltimes in a row without a new checkpoint, and the next one would end like them.
FRUITLESS_REQUEUES = 3


class Supervision:
    """A run under this supervisor: one attempt under Slurm, perhaps several without."""

    def __init__(self, run: RunDir, modules: Mapping[str, str]) -> None:
        self.run = run
        self.recipe: Recipe = load_run(run)
        self.plan = read_plan(run.plan)
        self.modules = modules
        self.allocation: Allocation = current_allocation(self.plan)
        self.signals = Signals()
        self.lock = RunLock(run, job_id=self.allocation.job_id, restart_count=self.allocation.restart_count)

    def run_attempts(self) -> int:
        """The exit code of the last attempt. Raises LockHeld."""
        self.lock.acquire(_job_alive)
        self.signals.install()
        try:
            for _ in range(LOCAL_RESUMES):
                outcome = self.run_attempt()
                if outcome.code != EXIT_REQUEUE or self.allocation.job_id is not None or self.signals.term:
                    break
                self.signals.walltime = False
        finally:
            self.lock.release()
        return outcome.code

    def run_attempt(self) -> Outcome:
        """One attempt, opened, run and closed."""
        attempt = open_attempt(
            self.run,
            job_id=self.allocation.job_id,
            restart_count=self.allocation.restart_count,
            nodes=self.allocation.nodes,
        )
        _log_to(self.run.open_logs(attempt.attempt) / "batch.log")
        events = EventLog(self.run, attempt.attempt)
        events.append("attempt_started", job_id=attempt.job_id, nodes=attempt.nodes, pid=os.getpid())
        LOG.info("attempt %d of %s, process %d", attempt.attempt, self.run.root, os.getpid())
        try:
            outcome = self._loop(attempt, events).run()
        except BusError as error:
            events.failure("redis", str(error))
            outcome = Outcome(EXIT_FAILED, "failed")
        except (LockLost, OSError, SlurmError, ValueError) as error:
            events.failure("supervisor", f"{type(error).__name__}: {error}")
            outcome = Outcome(EXIT_FAILED, "failed")
        if outcome.code == EXIT_REQUEUE:
            outcome = self._unless_fruitless(outcome, events)
        cause = first_cause(self.run, attempt.attempt) if outcome.reason == "failed" else None
        close_attempt(
            self.run,
            attempt,
            exit_code=outcome.code,
            reason=outcome.reason,
            cause=str(cause) if cause else None,
        )
        events.append(
            "attempt_ended", exit_code=outcome.code, reason=outcome.reason, first_cause=attempt.first_cause
        )
        LOG.info(
            "attempt %d: %s (exit code %d) %s", attempt.attempt, outcome.reason, outcome.code, cause or ""
        )
        self._report()
        return outcome

    def _unless_fruitless(self, outcome: Outcome, events: EventLog) -> Outcome:
        """`outcome`, or a failure when requeues have brought no new checkpoint for several attempts."""
        newest = self.run.latest_complete()
        attempts = read_attempts(self.run)
        earlier = requeues_without_progress(self.run)
        if attempts[-1].checkpoint != newest or earlier + 1 < FRUITLESS_REQUEUES:
            return outcome
        have = "no checkpoint" if newest is None else f"no checkpoint after step {newest}"
        events.failure(
            "supervisor",
            f"{FRUITLESS_REQUEUES} attempts in a row ended at the walltime with {have}; it is not requeued. "
            "Give it more time (cluster.time, cluster.signal_seconds) and `hpc-rl resume` it",
        )
        return Outcome(EXIT_FAILED, "failed")

    def _loop(self, attempt: Attempt, events: EventLog) -> AttemptLoop:
        environments = Environments(self.plan, self.recipe)
        redis = KeptRedis(
            self.run,
            attempt.attempt,
            events,
            bus_hosts(self.plan, self.allocation),
            scratch=Path(os.path.expandvars(environments.site.paths.local)),
            binary=self.recipe.cluster.controller.redis_server,
        )
        return AttemptLoop(
            self.run,
            attempt.attempt,
            redis=redis,
            launcher=self._launcher(attempt.attempt),
            controller=role_command(self.modules, self.run, "controller", attempt.attempt, 1, sys.executable),
            controller_env=environments.of_controller(),
            secrets=list(read_secrets(self.run).values()),
            signals=self.signals,
            lock=self.lock,
            events=events,
            warning_s=self.recipe.cluster.signal_seconds,
            term_grace_s=self.allocation.term_grace_s,
            # On disk before the flush: Slurm's SIGKILL may come first.
            on_term=lambda: close_attempt(
                self.run, attempt, exit_code=EXIT_TERM, reason="cancelled", cause=None
            ),
        )

    def _report(self) -> None:
        """The report with the end of this attempt in it, if anything was measured."""
        try:
            if self.run.metrics.exists():
                write_run_report(self.run)
        except (OSError, ValueError) as error:  # a full disk must not change how the attempt ended
            LOG.warning("report.html was not written: %s", error)

    def _launcher(self, attempt: int) -> Launcher:
        kind = LocalLauncher if self.allocation.job_id is None else SlurmLauncher
        return kind(self.run, self.plan, self.recipe, attempt, modules=self.modules)

    def requeue(self) -> None:
        """Have Slurm start the job again; a refusal is an event, and the exit code says the rest."""
        record = latest_job(self.run)
        if self.allocation.job_id is None or (record is not None and record.here):
            return
        self.signals.ignore()
        try:
            watcher.requeue(self.allocation.job_id)
        except SlurmError as error:
            LOG.error("the job could not be requeued: %s; `hpc-rl resume` continues it", error)
            EventLog(self.run, read_attempts(self.run)[-1].attempt).append(
                "requeue_refused", words=str(error)
            )


def supervise(run_dir: str, *, modules: Mapping[str, str] = MODULES) -> int:
    """Supervise the run in `run_dir` to its end. Returns 0; any other exit code is raised as SystemExit.

    (submitit records a returned value as success; SystemExit passes through it with its code.)
    `modules` maps roles to the programs that are started for them.
    """
    try:
        supervision = Supervision(RunDir(Path(run_dir)), modules)
        code = supervision.run_attempts()
    except LockHeld as error:
        _give_up(str(error), EXIT_STOPPED)
    except (ValueError, OSError, SlurmError) as error:
        _give_up(str(error), EXIT_FAILED)
    if code == EXIT_REQUEUE:
        supervision.requeue()
    if code != 0:
        raise SystemExit(code)
    return 0


def _give_up(words: str, code: int) -> NoReturn:
    print(f"hpc-rl supervisor: {words}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def _job_alive(job_id: str) -> bool | None:
    try:
        state = watcher.job_state(job_id)
    except SlurmError:
        return None
    return None if state is None else not state.final


def _log_to(path: Path) -> None:
    """Send this process's output, and its children's, to `path`: each attempt has its own batch.log."""
    print(f"hpc-rl: this attempt logs to {path.parent}", flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(target, number)
    os.close(target)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s supervisor: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
