"""Append-only JSON lines that survive a crash: one write per line, a torn last line is skipped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hpc_rl.run.paths import RunError


def _plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null, so that every reader can parse the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(_plain(entry), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def append(path: Path, *entries: dict[str, Any], sync: bool = True) -> None:
    """Append `entries`, one line each, in one write; `sync` waits until they are on disk.

    A line torn by an earlier crash is ended first, so that it cannot swallow the new one.
    """
    data = b"".join(_line(entry) for entry in entries)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data
        os.write(handle, data)
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole entries of `path`, in order; an absent file is empty, torn lines are skipped.

    Raises RunError for what is there and cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:  # a folder of that name, no permission, a broken disk
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    entries = []
    for line in data.split(b"\n"):
        try:
            entry = json.loads(line) if line.strip() else None
        except ValueError:
            continue  # torn by a crash in the middle of the write; nothing after it is lost
        if isinstance(entry, dict):
            entries.append(entry)
    return entries


def rewrite(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Replace the whole file atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        for entry in entries:
            file.write(_line(entry))
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o600)
    os.replace(temporary, path)


def move_aside(path: Path, aside: Path, moved: Callable[[dict[str, Any]], bool]) -> int:
    """Move the entries for which `moved` holds from `path` to the end of `aside`; how many.

    They are safe in `aside` before they leave `path`: a crash in between leaves them in both, and the
    next call moves them again.
    """
    entries = read(path)
    leaving = [entry for entry in entries if moved(entry)]
    if leaving:
        append(aside, *leaving)
        rewrite(path, (entry for entry in entries if not moved(entry)))
    return len(leaving)
