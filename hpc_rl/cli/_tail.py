"""Following files that grow: the log files of a run, over its attempts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROLES = ("controller", "policy", "rollout", "reward", "teacher", "redis", "batch")


def log_files(folder: Path, role: str | None) -> list[Path]:
    """The log files of an attempt; `role` is a role name (`policy`) or one process (`policy_0`)."""
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.glob("*.log") if path.is_file())
    if role is None:
        return files
    return [path for path in files if path.stem == role or path.stem.rpartition("_")[0] == role]


def last_lines(path: Path, count: int) -> tuple[list[str], int]:
    """The last `count` lines and the offset where they end; reads from the end of the file."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        start, data = end, b""
        while start > 0 and data.count(b"\n") <= count:
            step = min(65536, start)
            start -= step
            file.seek(start)
            data = file.read(step) + data
    lines = data.decode("utf-8", errors="replace").splitlines()
    return (lines[-count:] if count else []), end


class Follower:
    """Lines that files have gained since the last look. A torn last line waits for its end."""

    def __init__(self) -> None:
        self._offsets: dict[Path, int] = {}
        self._rest: dict[Path, bytes] = {}

    def start_at(self, path: Path, offset: int) -> None:
        self._offsets[path] = offset

    def new_lines(self, paths: list[Path]) -> Iterator[tuple[Path, str]]:
        """(file, line) of everything new, file by file. A file that shrank is read from its start."""
        for path in paths:
            try:
                with path.open("rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    offset = self._offsets.get(path, 0)
                    if size < offset:
                        offset, self._rest[path] = 0, b""
                    file.seek(offset)
                    data = file.read(1 << 20)
            except FileNotFoundError:
                continue
            self._offsets[path] = offset + len(data)
            *whole, rest = (self._rest.get(path, b"") + data).split(b"\n")
            self._rest[path] = rest
            for line in whole:
                yield path, line.decode("utf-8", errors="replace")
