"""What an evaluation alone leaves in its run directory: `evaluation.json`, and its answers as JSON lines.

Evaluations of a run are runs of their own below it: `<run>/eval/<what>/<run id>/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_rl.run.paths import RunDir


@dataclass(frozen=True)
class Evaluated:
    """`name` is what was evaluated in a word (`step_00000100`, `final`), `model` the folder of the weights,
    `data` where the rows are from."""

    name: str
    model: str
    data: str
    time: float
    seconds: float
    metrics: dict[str, float]


def evaluations(run: RunDir) -> Path:
    """The folder of a run's evaluations."""
    return run.root / "eval"


def result_file(run: RunDir) -> Path:
    return run.root / "evaluation.json"


def answers_file(run: RunDir) -> Path:
    return run.samples / "evaluation.jsonl"


def write_evaluated(run: RunDir, found: Evaluated, answers: Iterable[dict[str, Any]] = ()) -> None:
    """The answers first and the result last, each whole or not at all."""
    lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
    if lines:
        _write(answers_file(run), "".join(lines))
    _write(result_file(run), json.dumps(asdict(found), indent=2) + "\n")


def read_evaluated(run: RunDir) -> Evaluated | None:
    """The result of the evaluation in `run`; None if it has not ended."""
    try:
        return Evaluated(**json.loads(result_file(run).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def evaluated_below(run: RunDir) -> list[tuple[RunDir, Evaluated]]:
    """The evaluations of `run` that have ended, oldest first."""
    folders = [RunDir(path.parent) for path in evaluations(run).glob("*/*/evaluation.json")]
    found = [(folder, result) for folder in folders if (result := read_evaluated(folder)) is not None]
    return sorted(found, key=lambda pair: pair[1].time)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
