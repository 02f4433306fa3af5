"""Running Slurm's own programs: a deadline on each, one typed error, and an environment of our choice."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

DEADLINE_S = 30.0


class SlurmError(RuntimeError):
    """A Slurm command failed; the message is Slurm's own, with what was asked of it."""


class SlurmMissing(SlurmError):
    """A Slurm program is not installed on this machine."""


def run_slurm(
    argv: Sequence[str], *, environ: Mapping[str, str] | None = None, deadline_s: float = DEADLINE_S
) -> subprocess.CompletedProcess[str]:
    """Run one Slurm program and give what it printed, whatever its exit code.

    Times are asked for in ISO form, whatever the user's settings are.
    Raises SlurmMissing if it is not on PATH, SlurmError if it does not answer within `deadline_s` seconds.
    """
    environ = dict(os.environ if environ is None else environ)
    environ["SLURM_TIME_FORMAT"] = "standard"
    environ["LC_ALL"] = "C"
    program = shutil.which(argv[0], path=environ.get("PATH"))
    if program is None:
        raise SlurmMissing(
            f"{argv[0]} is not on PATH: this machine has no Slurm client; log in to a node of the "
            "cluster, or run without Slurm (`cluster.placement=local`)"
        )
    try:
        return subprocess.run(
            [program, *argv[1:]],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            env=environ,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(
            f"`{' '.join(argv)}` gave no answer within {deadline_s:g} s; "
            "is slurmctld reachable (`scontrol ping`)?"
        ) from error


def check_slurm(argv: Sequence[str], *, environ: Mapping[str, str] | None = None) -> str:
    """`run_slurm`, but a non-zero exit is a SlurmError that carries Slurm's message. Gives stdout."""
    done = run_slurm(argv, environ=environ)
    if done.returncode:
        message = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SlurmError(f"`{' '.join(argv)}` failed: {message}")
    return done.stdout
