"""The prompt ledger: which prompts each optimizer step trained on, and which were dropped and why.

One line per step in `ledger/prompts.jsonl`. In the surviving lineage every ordinal of an epoch is in
it exactly once, trained or dropped; lines after a restored checkpoint are moved aside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from hpc_rl.run import jsonl
from hpc_rl.run.paths import RunDir


class PromptLedger:
    """Written by the controller only."""

    def __init__(self, run: RunDir, attempt: int) -> None:
        self._path = run.ledger / "prompts.jsonl"
        self._file = jsonl.Appender(self._path)
        self._attempt = attempt

    def append(
        self,
        step: int,
        trained: Iterable[int],
        dropped: Mapping[int, str] | None = None,
        **fields: object,
    ) -> None:
        """Step `step` was trained on the prompts `trained`; `dropped` maps ordinals to a reason."""
        entry = {
            "step": step,
            "attempt": self._attempt,
            "trained": list(trained),
            "dropped": {str(ordinal): reason for ordinal, reason in (dropped or {}).items()},
            **fields,
        }
        self._file.append(entry)

    def roll_back(self, step: int) -> int:
        """Move the lines after the restored `step` to ledger/prompts_rolled_back.jsonl; how many."""
        aside = self._path.with_name("prompts_rolled_back.jsonl")
        return jsonl.move_aside(self._path, aside, lambda entry: int(entry["step"]) > step)


def count_prompts(run: RunDir) -> tuple[Counter[int], dict[int, str]]:
    """How often each ordinal was trained, and the dropped ones with their reasons."""
    trained: Counter[int] = Counter()
    dropped: dict[int, str] = {}
    for entry in jsonl.read(run.ledger / "prompts.jsonl"):
        trained.update(entry["trained"])
        dropped.update({int(ordinal): reason for ordinal, reason in entry["dropped"].items()})
    return trained, dropped
