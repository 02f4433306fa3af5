"""What submitit runs in the batch step: the supervisor of one run, named and not pickled."""

from __future__ import annotations

import pkgutil

# By name: this room stands below the supervisor's and does not import it.
SUPERVISE = "hpc_rl.supervisor.main:supervise"


class SupervisorTask:
    """Calls `supervise(run_dir)` and ends the process with its code.

    The pickle holds two strings and the name of this class. submitit requeues a task on USR2 only if it
    has a `checkpoint`; this one has none, and the supervisor takes the signals over at its start.
    """

    def __init__(self, run_dir: str, entry: str = SUPERVISE) -> None:
        self.run_dir = run_dir
        self.entry = entry

    def __call__(self) -> int:
        code = pkgutil.resolve_name(self.entry)(self.run_dir)
        if code:
            raise SystemExit(code)  # so that Slurm sees the run's code; submitit's own would always be 1
        return 0
