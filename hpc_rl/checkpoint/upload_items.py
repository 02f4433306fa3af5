"""What of a run is uploaded, and as which objects. No torch.

    s3://bucket/prefix/<recipe name>/<run id>/
        run/…                               what resume needs besides a checkpoint: settings, records, code
        checkpoints/step_00000100/…         as in the run directory
        safetensors/final/…
        uploads/checkpoints/step_00000100.json   its files with sizes and checksums, written last: it counts

A folder without its list under `uploads/` is not complete.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from hpc_rl.checkpoint.layout import complete_checkpoints
from hpc_rl.checkpoint.manifest import FileEntry, checksum, read_manifest, verify
from hpc_rl.checkpoint.s3 import Location, S3Store, UploadError
from hpc_rl.run.paths import RunDir

What = Literal["final", "all"]
# Files and folders of the run directory that come along. Not: secrets, logs, locks, and what names the job
# and the machine it ran on (jobs.jsonl), which means nothing elsewhere.
RUN_FILES = ("recipe.yaml", "resolved.yaml", "plan.json", "attempts.jsonl", "events.jsonl", "metrics.jsonl")
RUN_FOLDERS = ("code", "ledger")
RUN_SINGLES = ("wandb/run_id", "checkpoints/best.json")
CHECKPOINTS, EXPORTS, RUN = "checkpoints", "safetensors", "run"


class Uploaded(msgspec.Struct):
    """The list of an uploaded folder; names are relative to it."""

    item: str
    files: dict[str, FileEntry]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.files.values())


@dataclass(frozen=True)
class Done:
    """`sent` bytes of `nbytes` had to be sent: the others were there."""

    item: str
    nbytes: int
    sent: int


def run_location(base: Location, run: RunDir) -> Location:
    return base.under(run.recorded_name(), run.run_id)


def list_key(item: str) -> str:
    return f"uploads/{item}.json"


def items_of(run: RunDir, what: What) -> list[str]:
    """Folders to upload, relative to the run: complete checkpoints and finished exports, all of them, or
    the newest checkpoint and the final export."""
    checkpoints = [f"{CHECKPOINTS}/{folder.name}" for folder in complete_checkpoints(run.checkpoints)]
    exports = sorted(
        f"{EXPORTS}/{folder.name}"
        for folder in (run.safetensors.iterdir() if run.safetensors.is_dir() else ())
        if folder.is_dir() and not folder.name.startswith(".")
    )
    if what == "all":
        return checkpoints + exports
    return checkpoints[-1:] + [item for item in exports if item == f"{EXPORTS}/final"]


def files_of(run: RunDir, item: str) -> Uploaded:
    """The files of a folder with sizes and checksums. Raises UploadError if it is gone or not complete.

    Checkpoints bring theirs along in COMPLETE; what is not there is hashed here.
    """
    folder = run.root / item
    known: dict[str, FileEntry] = {}
    try:
        if item.startswith(f"{CHECKPOINTS}/"):
            known = read_manifest(folder).files
            if problem := verify(folder):
                raise UploadError(f"{folder}: {problem}", permanent=True)
        files = {}
        for parent, _, names in os.walk(folder):
            for name in names:
                path = Path(parent, name)
                relative = str(path.relative_to(folder))
                entry = known.get(relative)
                if entry is None or not entry.xxh3:
                    entry = FileEntry(path.stat().st_size, checksum(path))
                files[relative] = entry
    except FileNotFoundError as error:
        raise UploadError(f"{error.filename} is gone: a newer one superseded it", permanent=True) from error
    except (OSError, ValueError) as error:
        raise UploadError(f"{item} cannot be read: {error}", permanent=True) from error
    if not files:
        raise UploadError(f"{folder} is not there", permanent=True)
    return Uploaded(item, files)


class Progress:
    """A line for every gigabyte or so of a large file that was sent. Called from several threads."""

    EVERY = 1 << 30

    def __init__(self, name: str, entry: FileEntry, say: Callable[[str], None]) -> None:
        self._name, self._entry, self._say = name, entry, say
        self._sent = self._said = 0
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._sent += nbytes
            if self._sent - self._said >= self.EVERY:
                self._said = self._sent
                self._say(f"{self._name}: {self._sent / 1e9:.1f} of {self._entry.nbytes / 1e9:.1f} GB sent")


def upload_item(store: S3Store, run: RunDir, item: str, say: Callable[[str], None]) -> Done:
    """Store a folder, what is there already left out, and then its list. Raises UploadError."""
    listed = files_of(run, item)
    sent = 0
    try:
        for name, entry in sorted(listed.files.items()):
            one = store.put_file(f"{item}/{name}", run.root / item / name, entry, Progress(name, entry, say))
            if one:
                sent += one
                rest = "" if one == entry.nbytes else f" of {entry.nbytes / 1e6:.1f} MB; the rest was there"
                say(f"{item}/{name}: {one / 1e6:.1f} MB{rest}")
    except FileNotFoundError as error:
        raise UploadError(f"{error.filename} is gone: a newer one superseded it", permanent=True) from error
    store.put(list_key(item), msgspec.json.encode(listed))
    return Done(item, listed.nbytes, sent)


def upload_run_files(store: S3Store, run: RunDir) -> None:
    """Store the run's settings and records as they are now. Raises UploadError."""
    paths = [run.root / name for name in (*RUN_FILES, *RUN_SINGLES)]
    for folder in RUN_FOLDERS:
        paths += [path for path in sorted((run.root / folder).rglob("*")) if "__pycache__" not in path.parts]
    for path in paths:
        if path.is_file():
            store.put(f"{RUN}/{path.relative_to(run.root)}", path.read_bytes())
