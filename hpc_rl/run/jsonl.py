"""Append-only JSON lines that survive a crash: one write per line, a torn last line is skipped."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hpc_rl.run.paths import RunError

LOG = logging.getLogger("hpc_rl.run")
# A filesystem that is full, or away for a while.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
KEPT_AT_MOST = 10_000


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


def append(path: Path, *entries: dict[str, Any], sync: bool = True, mode: int = 0o600) -> None:
    """Append `entries`, one line each, in one write; `sync` waits until they are on disk.

    A line torn by an earlier crash is ended first, so that it cannot swallow the new one. Raises OSError.
    """
    data = b"".join(_line(entry) for entry in entries)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, mode)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data
        if os.write(handle, data) != len(data):  # cut short by a disk that is full now
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


class Appender:
    """One process's appends to one file. A full disk does not end a run that could go on: what cannot be
    written is kept, and written before the next entries as soon as that works."""

    def __init__(self, path: Path, *, sync: bool = True, mode: int = 0o600) -> None:
        self.path, self._sync, self._mode = path, sync, mode
        self._kept: list[dict[str, Any]] = []

    def append(self, *entries: dict[str, Any]) -> None:
        """Raises OSError, but not for one that may pass (`PASSING`)."""
        kept, self._kept = self._kept, [*self._kept, *entries]
        while self._kept:
            try:  # one by one: a write that is cut short must not leave whole lines that are written again
                append(self.path, self._kept[0], sync=self._sync, mode=self._mode)
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                if not kept:
                    LOG.error("%s: %s; entries wait in memory", self.path, error.strerror)
                self._kept = self._kept[-KEPT_AT_MOST:]
                return
            self._kept = self._kept[1:]


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
