"""What a check found: a level, the place, what is wrong and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpc_rl.recipe.load import LoadedRecipe


@dataclass(frozen=True)
class Finding:
    """One result of the preflight ladder. `ok` says that something was looked at and is right."""

    level: Literal["error", "warning", "ok"]
    where: str  # file:line and key path, or what was looked at
    message: str
    fix: str = ""

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.where, self.message) if part)
        return f"{text}; {self.fix}" if self.fix else text


def place(loaded: LoadedRecipe, *path: str | int) -> str:
    """`file:line: a.b` of a key, for `Finding.where`."""
    problem = loaded.problem("", *path)
    return f"{problem.where}: {problem.key}"


class PreflightError(ValueError):
    """Something would fail in the job; `findings` holds all results, errors among them."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = findings
        super().__init__("\n".join(str(finding) for finding in findings if finding.level == "error"))
