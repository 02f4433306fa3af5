"""Archives of media below a folder: unpacked once, by whoever comes first, whole or not at all. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_rl.data.errors import DataError

LOG = logging.getLogger("hpc_rl.data")
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
UNPACKED = ".unpacked"
_SOURCE = ".hpc-rl-source.json"
_BEAT_S, _STALE_S, _POLL_S = 5.0, 60.0, 0.5


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def unpack(archive: Path, cache: Path, limit_s: float = 3600.0) -> Path:
    """The folder with the archive's content: `<archive>.unpacked` beside it, or below `cache` where that
    folder cannot be written. Other processes, on this node or another, wait for the first.

    Raises DataError for a damaged archive, one with paths outside of it, or when the wait is too long.
    """
    for target in (archive.with_name(archive.name + UNPACKED), _in_cache(archive, cache)):
        if _is_whole(target, archive):
            return target
    target = archive.with_name(archive.name + UNPACKED)
    if not os.access(archive.parent, os.W_OK):
        target = _in_cache(archive, cache)
        target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f".{target.name}.lock"), archive, limit_s):
        if not _is_whole(target, archive):
            _unpack_into(archive, target)
    return target


def _in_cache(archive: Path, cache: Path) -> Path:
    digest = hashlib.sha256(str(archive.resolve()).encode()).hexdigest()[:12]
    return cache / f"{archive.name}-{digest}{UNPACKED}"


def _stamp(archive: Path) -> dict[str, int]:
    found = archive.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def _is_whole(target: Path, archive: Path) -> bool:
    """The rename that makes `target` comes last; another size or time means another archive."""
    try:
        return bool(json.loads((target / _SOURCE).read_text(encoding="utf-8")) == _stamp(archive))
    except (OSError, ValueError):
        return False


def _unpack_into(archive: Path, target: Path) -> None:
    scratch = target.with_name(f".{target.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    began = time.monotonic()
    LOG.info("unpacking %s into %s", archive, target)
    try:
        if archive.name.lower().endswith(".zip"):
            _unzip(archive, scratch)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")  # refuses paths and links that lead outside
        (scratch / _SOURCE).write_text(json.dumps(_stamp(archive)), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)  # of an archive that was replaced
        scratch.rename(target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise DataError(f"{archive} cannot be unpacked into {target}: {error}") from error
    LOG.info("unpacked %s in %.0f s", archive, time.monotonic() - began)


def _unzip(archive: Path, scratch: Path) -> None:
    """As the tar filter: no absolute paths, no `..`, no links. Raises ValueError."""
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            place = (scratch / member.filename).resolve()
            if not place.is_relative_to(scratch.resolve()) or member.filename.startswith("/"):
                raise ValueError(f"{member.filename!r} leads outside of the archive")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise ValueError(f"{member.filename!r} is a link")
        file.extractall(scratch)


@contextmanager
def _lock(path: Path, archive: Path, limit_s: float) -> Iterator[None]:
    """A file that only one process can create; its age tells whether that process still lives.

    Not `flock`: parallel filesystems are often mounted without it.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            break
        except FileExistsError:
            _remove_stale(path)
        except OSError as error:
            raise DataError(f"{archive} cannot be unpacked: {path}: {error.strerror}") from error
        if time.monotonic() > deadline:
            raise DataError(f"{archive} was not unpacked within {limit_s:.0f} s by the holder of {path}")
        time.sleep(_POLL_S)
    ended = threading.Event()
    beat = threading.Thread(target=_keep_fresh, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        path.unlink(missing_ok=True)


def _keep_fresh(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT_S):
        try:
            os.utime(path)
        except FileNotFoundError:
            return


def _remove_stale(path: Path) -> None:
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return
    if age > _STALE_S:
        LOG.warning("%s is %.0f s old: its process died; taking over", path, age)
        path.unlink(missing_ok=True)
