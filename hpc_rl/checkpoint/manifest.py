"""What a checkpoint consists of: its files, their sizes and checksums, kept in `COMPLETE`. No torch.

Each writer counts and hashes (XXH3, 64 bits: faster than memory) what it writes while it writes it, so no
file is read again. On a restart the sizes are compared, which costs one `stat` per file and finds what
crashes and full disks leave; checksums are compared on demand and when a load failed.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import msgspec
import xxhash

COMPLETE = "COMPLETE"
BAD = "BAD"
WRITTEN = ".files.json"  # in policy/: what the policy's ranks wrote, as rank 0 collected it
CHUNK = 8 << 20


class FileEntry(msgspec.Struct):
    """`xxh3` is the hexadecimal XXH3-64 of the file's bytes; empty where nobody hashed it."""

    nbytes: int
    xxh3: str = ""


class Written(msgspec.Struct):
    """The files of the policy's part, relative to it, and by how many ranks they were written."""

    world_size: int
    files: dict[str, FileEntry]


class Manifest(msgspec.Struct):
    """What `COMPLETE` holds. `files` are relative to the checkpoint folder; none in old checkpoints."""

    step: int | None = None
    time: float = 0.0
    world_size: int = 0
    files: dict[str, FileEntry] = {}


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable (a rename is only in memory until then)."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write `path` so that it is there whole and durable, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk every byte counts
        raise
    sync_folder(path.parent)


def checksum(path: Path) -> str:
    """XXH3-64 of the file, in hexadecimal."""
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """What `COMPLETE` of `folder` says. Raises ValueError if it is not what we write."""
    try:
        return msgspec.json.decode((folder / COMPLETE).read_bytes(), type=Manifest)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{folder / COMPLETE} is damaged: {error}") from error


def write_complete(folder: Path, step: int | None) -> Manifest:
    """Declare the checkpoint in `folder` complete, after comparing every file with what was written.

    What a rank wrote it has synced and hashed itself; all other files (the controller's) are synced and
    hashed here. Raises ValueError if the policy's part is not there, or not as it was written.
    """
    policy = folder / "policy"
    if not (policy / ".metadata").is_file():
        raise ValueError(f"{folder} has no finished policy part (policy/.metadata); it cannot be complete")
    manifest = Manifest(step, time.time())
    recorded: dict[str, FileEntry] = {}
    if (policy / WRITTEN).is_file():
        written = msgspec.json.decode((policy / WRITTEN).read_bytes(), type=Written)
        manifest.world_size = written.world_size
        recorded = {f"policy/{name}": entry for name, entry in written.files.items()}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            relative = str(path.relative_to(folder))
            if relative not in (COMPLETE, BAD):
                manifest.files[relative] = recorded.get(relative) or _entry(path)
        sync_folder(Path(parent))
    lost = sorted(set(recorded) - set(manifest.files))
    problem = f"{lost[0]} is missing" if lost else _compare(folder, manifest, checksums=False)
    if problem:
        raise ValueError(f"{folder} cannot be complete: {problem}")
    write_atomic(folder / COMPLETE, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")
    sync_folder(folder.parent)
    return manifest


def _entry(path: Path) -> FileEntry:
    """A file that nobody accounted for: synced and, outside the policy's part, hashed here."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        nbytes = os.fstat(file.fileno()).st_size
    large = path.parent.name == "policy" and path.name != WRITTEN
    return FileEntry(nbytes, "" if large else checksum(path))


def verify(folder: Path, *, checksums: bool = False) -> str:
    """Why the complete checkpoint in `folder` is not what was saved, naming the file; "" if it is.

    Sizes always, the bytes with `checksums`. Who saved it, and how many ranks, does not matter.
    """
    try:
        manifest = read_manifest(folder)
        if not (folder / "policy" / ".metadata").is_file():
            return "policy/.metadata is missing"
        return _compare(folder, manifest, checksums=checksums)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, OSError) as error:
        return str(error)


def _compare(folder: Path, manifest: Manifest, *, checksums: bool) -> str:
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            nbytes = path.stat().st_size
            if nbytes != entry.nbytes:
                return f"{name} has {nbytes} bytes, {entry.nbytes} were written"
            if checksums and entry.xxh3 and checksum(path) != entry.xxh3:
                return f"the contents of {name} changed since they were written (checksum)"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def mark_bad(folder: Path, reason: str) -> None:
    """Never to be chosen again: a run that went on from an older one must not come back to it."""
    write_atomic(folder / BAD, json.dumps({"reason": reason, "time": time.time()}) + "\n")
