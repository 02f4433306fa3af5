"""`sbatch --test-only`: would Slurm take this job, and when would it start? Nothing is queued."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.cluster.environment import submission_environment
from hpc_rl.cluster.slurm.commands import SlurmError, run_slurm
from hpc_rl.cluster.slurm.script import JobScript

_START = re.compile(r"[Jj]ob \d+ to start at (\S+)(?: using (\d+) processors)?(?: on (?:nodes )?(\S+))?")
_HINTS = (
    ("invalid partition", "set cluster.<role>.partition to one of: {partitions}"),
    ("invalid account", "set cluster.<role>.account; `sacctmgr show assoc user=$USER` lists yours"),
    ("invalid qos", "set cluster.<role>.qos; `sacctmgr show assoc user=$USER format=qos` lists yours"),
    ("node configuration is not available", "no nodes of a partition can ever give what one component asks"),
    ("invalid feature", "set cluster.<role>.constraint; `sinfo -o '%P %f'` lists features"),
    ("time limit", "lower cluster.time; `sinfo -o '%P %l'` lists the limits"),
    (
        "invalid generic resource",
        "set gpus.style and gpus.type in the site profile as `sinfo -o '%P %G'` says",
    ),
)


@dataclass(frozen=True)
class Trial:
    """What Slurm would do with the script now. `start` is its estimate (ISO), `nodes` the nodes for it."""

    start: str
    nodes: str
    text: str


def try_submit(script: JobScript, folder: Path, *, environ: Mapping[str, str] | None = None) -> Trial:
    """`sbatch --test-only` of the script: nothing is queued. Raises SlurmError with the reason and a hint.

    Plain sbatch accepts, on many clusters, what can never start; this does not.
    """
    environ = os.environ if environ is None else environ
    text = script.render(folder, environ=environ)
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        done = run_slurm(
            ["sbatch", "--test-only", file.name], environ=submission_environment(environ, script.secrets)
        )
    said = f"{done.stderr}\n{done.stdout}".strip()
    if done.returncode:
        raise SlurmError(f"Slurm would not take this job: {_clear(said)}{_hint(said)}")
    match = _START.search(said)
    return Trial(match[1] if match else "", (match[3] or "") if match else "", said)


def _clear(said: str) -> str:
    lines = [
        re.sub(r"^(sbatch: )?(error: )?(allocation failure: )?", "", line.strip())
        for line in said.splitlines()
    ]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def _hint(said: str) -> str:
    for words, hint in _HINTS:
        if words in said.lower():
            return "\n" + hint.format(partitions=_partitions())
    return ""


def _partitions() -> str:
    try:
        done = run_slurm(["sinfo", "-h", "-o", "%R"])
    except SlurmError:
        return "see `sinfo`"
    return ", ".join(dict.fromkeys(done.stdout.split())) or "see `sinfo`"
