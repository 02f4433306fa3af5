"""What a run directory holds that nothing needs any more, and its removal (`hpc-rl clean`). No torch.

What stays: the newest complete checkpoint (and the newest that verifies), the best one, everything newer
than the newest; the final export, or else the newest export, and that of the best checkpoint. Folders with
names that are not ours are never touched.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc_rl.checkpoint.layout import choose, complete_checkpoints, step_of, superseded, sweep, take
from hpc_rl.run.best import read_best
from hpc_rl.run.paths import RunDir

_LEFT_EXPORT = re.compile(r"^\.(final|step_\d{8,})\..+\.(partial|old)$")
_GOING = re.compile(r"^\.deleting-")
_ATTEMPT = re.compile(r"^attempt_(\d+)$")


@dataclass(frozen=True)
class Item:
    """Something that may go. `nbytes` and `files` are what goes with it (folders count as files: inodes)."""

    path: Path
    why: str
    nbytes: int
    files: int

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def removable(run: RunDir, *, keep: int = 1, logs: bool = False, waiting: bool = False) -> list[Item]:
    """What may go, checkpoints first. `keep` complete checkpoints stay besides the best.

    `waiting`: the run's job may start at any moment, so only what no start of it would touch is listed:
    superseded complete checkpoints, and what was taken out of the way before.
    """
    found = _checkpoints(run, keep, waiting) + _going(run)
    if not waiting:
        found += _exports(run) + (_logs(run) if logs else [])
    return found


def remove(items: list[Item]) -> list[Item]:
    """Remove the items; those that were still there. A crash leaves only what a later `clean` removes."""
    gone = []
    for item in items:
        if not item.path.exists():  # another one was faster
            continue
        if not _GOING.match(item.path.name):
            take(item.path)
        gone.append(item)
    for folder in {item.path.parent for item in items}:
        sweep(folder)
    return gone


def _checkpoints(run: RunDir, keep: int, waiting: bool) -> list[Item]:
    folder = run.checkpoints
    if not folder.is_dir():
        return []
    complete = complete_checkpoints(folder)
    good, best = choose(folder).folder, read_best(run)
    stay = {step_of(good)} if good is not None else set()
    stay |= {best.step} if best is not None else set()
    protected = [step for step in stay if step is not None]
    items = []
    for path in superseded(folder, max(1, keep), protected=protected):
        if path.is_symlink() or (waiting and path not in complete):
            continue
        why = "superseded" if path in complete else "left over by a crash or a failed save"
        items.append(_item(path, f"checkpoint, {why}"))
    return items


def _exports(run: RunDir) -> list[Item]:
    folder = run.safetensors
    entries = sorted(_folders(folder))
    items = [_item(path, "half an export") for path in entries if _LEFT_EXPORT.match(path.name)]
    steps = [path for path in entries if step_of(path) is not None]
    best = read_best(run)
    keep = [path for path in steps if best is not None and step_of(path) == best.step]
    if not (folder / "final").is_dir():
        keep += steps[-1:]
    return [_item(path, "export of a step") for path in steps if path not in keep] + items


def _going(run: RunDir) -> list[Item]:
    places = (run.checkpoints, run.safetensors, run.logs)
    paths = [path for place in places for path in _folders(place) if _GOING.match(path.name)]
    return [_item(path, "a removal that was cut off") for path in sorted(paths)]


def _logs(run: RunDir) -> list[Item]:
    numbers = {int(m.group(1)): path for path in _folders(run.logs) if (m := _ATTEMPT.match(path.name))}
    return [_item(numbers[n], "logs of an earlier attempt") for n in sorted(numbers)[:-1]]


def _folders(place: Path) -> list[Path]:
    """Real folders: what a link points to may be somebody else's."""
    if not place.is_dir():
        return []
    return [path for path in place.iterdir() if path.is_dir() and not path.is_symlink()]


def _item(path: Path, why: str) -> Item:
    nbytes, files = 0, 1
    for parent, folders, names in os.walk(path):
        files += len(folders) + len(names)
        for name in names:
            try:
                nbytes += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # going while we count
                files -= 1
    return Item(path, why, nbytes, files)
