"""What became of a run's exports and uploads, from its events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UploadLine:
    """The latest word on one folder and target. `error` is empty when it is stored."""

    item: str
    target: str
    error: str
    time: float

    def words(self) -> str:
        if not self.error:
            return f"{self.item} is at {self.target}"
        where = f" to {self.target}" if self.target else ""
        return f"{self.item}{where} FAILED: {self.error}"


def upload_lines(events: Iterable[Mapping[str, Any]]) -> list[UploadLine]:
    """One line per folder and target, in the order of the last words on them."""
    found: dict[tuple[str, str], UploadLine] = {}
    for event in events:
        if event.get("kind") not in ("uploaded", "upload_failed"):
            continue
        item, target = str(event["item"]), str(event["target"])
        if not item:  # the target as a whole
            item = "everything"
        error = str(event["error"]) if event["kind"] == "upload_failed" else ""
        stale = [(item, ""), (item, target)] + ([] if error else [("everything", target)])
        for key in stale:
            found.pop(key, None)
        found[item, target] = UploadLine(item, str(event.get("url") or target), error, float(event["time"]))
    return list(found.values())


def export_problem(events: Iterable[Mapping[str, Any]]) -> str | None:
    """The exports whose last try failed; None if there are none."""
    failed: dict[str, str] = {}
    for event in events:
        if event.get("kind") == "export_failed":
            failed[str(event["label"])] = str(event["error"])
        elif event.get("kind") == "exported":
            failed.pop(str(event["label"]), None)
    words = [f"export {label} failed: {error}" for label, error in failed.items()]
    return "; ".join(words[-3:]) or None
