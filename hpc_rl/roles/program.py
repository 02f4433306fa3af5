"""The command line that the supervisor gives to role processes, and the frame around their bodies."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc_rl.roles.process import EXIT_FAILED, RoleProcess
from hpc_rl.run.paths import RunDir


def parse(role: str, argv: Sequence[str]) -> RoleProcess:
    """`RUN_DIR --attempt N --incarnation I [--rank R | --replica K]` as a RoleProcess.

    Without --rank and --replica the index is the Slurm task's (SLURM_PROCID); the controller's is 0.
    """
    parser = argparse.ArgumentParser(prog=f"python -m hpc_rl.{role}")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--incarnation", type=int, default=1)
    parser.add_argument("--rank", "--replica", type=int, dest="index")
    options = parser.parse_args(argv)
    index = options.index
    if index is None:
        index = 0 if role == "controller" else os.environ.get("SLURM_PROCID")
    if index is None:
        parser.error("outside a Slurm step --rank (policy) or --replica (rollout) is needed")
    return RoleProcess(RunDir(options.run_dir), role, int(index), options.attempt, options.incarnation)


def main(role: str, body: Callable[[RoleProcess], int | None], argv: Sequence[str] | None = None) -> int:
    """Run `body` as process of `role`; the exit code. Failures are reported and logged, not raised."""
    process = parse(role, sys.argv[1:] if argv is None else argv)
    try:
        with process:
            return body(process) or 0
    except Exception:  # noqa: BLE001 -- reported with its traceback by RoleProcess; only the code is left
        return EXIT_FAILED
