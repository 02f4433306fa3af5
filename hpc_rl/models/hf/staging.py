"""`model.stage`: a copy of the model's folder on the local disk of each node, made once per node.

Whichever process of a node comes first (a policy rank, a rollout replica) copies; the others wait for it.
That is a `flock` on the node's own disk, so it ends with the process that holds it, however that ends. A copy
is complete when it has its name, which is of the source's files, their sizes and times: later attempts and
other runs on the node find it, and other files get another copy. A disk that is too small costs a warning
and not the run: the model is read from where it is then.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from hpc_rl.models.base import ModelError
from hpc_rl.models.hf.folder import model_folder
from hpc_rl.recipe.schema import Model

LOG = logging.getLogger("hpc_rl.models")
CHUNK_BYTES = 16 << 20
COPIERS = 4  # files at once: what one reader gets of a parallel filesystem is not what a node gets
MARGIN_BYTES = 64 << 20  # left free for others
STALL_LIMIT_S = 300.0  # without a chunk written
RETRY_S = 600.0  # a disk that was found too small is not tried again for so long
POLL_S = 0.1
_OTHER_FORMATS = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".distcp", ".h5", ".msgpack", ".gguf", ".onnx", ".ot", ".pkl"}
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class _NoRoom(Exception):
    """The disk is too small; the text says by how much."""


@dataclass(frozen=True)
class _File:
    name: str  # relative to the folder
    size: int
    mtime_ns: int


def staged_folder(spec: Model) -> Path:
    """Where this node reads the model of the recipe: `model_folder`, or its copy where `stage` is set.

    Blocks while another process of the node copies. Raises ModelError if the folder of `stage` cannot be
    used, if a copy is not what was read, or if the process that copies makes no progress.
    """
    source = model_folder(spec.path, spec.revision)
    if spec.stage is None:
        return source
    files = _files(source)
    try:
        stage = _stage_folder(spec.stage)
        target = stage / f"{Path(spec.path).name}-{_name_of(source, files)}"
        with _lock(stage / f".{target.name}.lock", source) as lock:
            if _is_whole(target, files):
                LOG.info("model.stage: reading %s, copied earlier", target)
            else:
                _copy_once(source, files, target, lock)
        return target
    except _NoRoom as full:
        LOG.warning("model.stage: %s: %s; reading from %s instead", socket.gethostname(), full, source)
        return source
    except OSError as error:
        if error.errno in _FULL:  # for the lock, too
            LOG.warning("model.stage: %s: %s; reading from %s instead", socket.gethostname(), error, source)
            return source
        raise ModelError(f"model.stage: {source} cannot be copied to {spec.stage}: {error}") from error


def _stage_folder(text: str) -> Path:
    host = socket.gethostname()
    path = Path(os.path.expandvars(text)).expanduser()
    if not path.is_absolute():
        raise ModelError(f"model.stage: {text} is {path} on {host}: it must be an absolute path there")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise ModelError(f"model.stage: {path} cannot be made on {host}: {error.strerror}") from error
    return path


def _files(folder: Path) -> list[_File]:
    """What makes up the model, largest first: not other formats of the weights, nor safetensors below the
    top (an original's), nor what is hidden. Links are followed to files (the Hub cache is links)."""
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place) / name
            nested = path.suffix == ".safetensors" and path.parent != folder
            if name.startswith(".") or path.suffix in _OTHER_FORMATS or nested or not path.is_file():
                continue
            status = path.stat()
            found.append(_File(str(path.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return sorted(found, key=lambda file: (-file.size, file.name))


def _name_of(source: Path, files: list[_File]) -> str:
    """Sixteen digits that change with the source. Each user has copies of their own."""
    facts = [os.geteuid(), str(source), [[file.name, file.size, file.mtime_ns] for file in files]]
    return xxhash.xxh3_64_hexdigest(json.dumps(facts).encode())


def _is_whole(target: Path, files: list[_File]) -> bool:
    """All files are there in their size: what cleans a local disk may take some of them. Raises ModelError
    if somebody else made the folder."""
    try:
        if target.lstat().st_uid != os.geteuid():
            raise ModelError(f"model.stage: {target} on {socket.gethostname()} is another user's; remove it")
        return all((target / file.name).stat().st_size == file.size for file in files)
    except FileNotFoundError:
        return False


# --- the lock ---------------------------------------------------------------------------------------------
class _Lock:
    """The open file; its time says when the holder last wrote a chunk, its text who that is, or that the
    disk was too small."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.stop = threading.Event()

    def beat(self) -> None:
        """After every chunk. Raises OSError when the other files need not be copied any more."""
        os.utime(self._handle)
        if self.stop.is_set():
            raise OSError(errno.ECANCELED, "another file could not be copied")

    def say(self, **facts: object) -> None:
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(facts).encode(), 0)
        except OSError as error:
            if error.errno not in _FULL:  # it is for messages, and copying says the same
                raise

    def read(self) -> dict[str, object]:
        try:
            return dict(json.loads(os.pread(self._handle, 4096, 0)))
        except ValueError:  # empty, or being written
            return {}

    def age(self) -> float:
        return time.time() - os.fstat(self._handle).st_mtime


@contextmanager
def _lock(path: Path, source: Path) -> Iterator[_Lock]:
    """Hold `path`, or raise ModelError when its holder writes nothing for STALL_LIMIT_S."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        lock, waiting = _Lock(handle), False
        while not _try(handle, path):
            if not waiting:
                LOG.info("model.stage: waiting for %s to be copied (%s)", source, lock.read())
                waiting, since = True, time.time()
            stalled = min(lock.age(), time.time() - since)
            if stalled > STALL_LIMIT_S:
                who = lock.read()
                raise ModelError(
                    f"model.stage: process {who.get('pid')} on {who.get('host')} holds {path} to copy "
                    f"{source}, and has written nothing for {stalled:.0f} s; end it, or leave model.stage out"
                )
            time.sleep(POLL_S)
        yield lock
    finally:
        os.close(handle)


def _try(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ModelError(
            f"model.stage: {path.parent} on {socket.gethostname()} has no file locks ({error.strerror}); "
            "it must be on a disk of the node"
        ) from error
    return True


# --- copying ----------------------------------------------------------------------------------------------
def _copy_once(source: Path, files: list[_File], target: Path, lock: _Lock) -> None:
    """Raises _NoRoom, also when the process before found none: not all that waited for it try again."""
    full = lock.read().get("full")
    if full is not None and lock.age() < RETRY_S:
        raise _NoRoom(str(full))
    lock.say(pid=os.getpid(), host=socket.gethostname())
    try:
        _copy_all(source, files, target, lock)
    except _NoRoom as error:
        lock.say(full=str(error))
        raise


def _copy_all(source: Path, files: list[_File], target: Path, lock: _Lock) -> None:
    """Copy, check and name. Nothing is left of a copy that fails. Raises _NoRoom, OSError or ModelError."""
    scratch = target.with_name(f".{target.name}.{socket.gethostname()}.partial")
    for old in (scratch, target):  # of a process that was killed; with files missing
        shutil.rmtree(old, ignore_errors=True)
    nbytes = sum(file.size for file in files)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes + MARGIN_BYTES:
        raise _NoRoom(f"{target.parent} has {_gb(free)} free and the model takes {_gb(nbytes)}")
    LOG.info("model.stage: copying %s (%s) to %s", source, _gb(nbytes), target)
    began = time.monotonic()
    try:
        scratch.mkdir(mode=0o700)
        with ThreadPoolExecutor(COPIERS) as pool:
            try:
                jobs = [pool.submit(_copy, source, file, scratch, lock) for file in files]
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()
            except BaseException:
                lock.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        scratch.rename(target)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _NoRoom(f"{target.parent} was full before {_gb(nbytes)} were copied") from error
        raise
    LOG.info("model.stage: %s copied and checked in %.1f s", _gb(nbytes), time.monotonic() - began)


def _copy(source: Path, file: _File, scratch: Path, lock: _Lock) -> None:
    """Copy one file, and read the copy again: it must be what was read."""
    target = scratch / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    read = xxhash.xxh3_128()
    with (source / file.name).open("rb") as left, target.open("xb") as right:
        while chunk := left.read(CHUNK_BYTES):
            read.update(chunk)
            right.write(chunk)
            lock.beat()
        right.flush()
        os.fsync(right.fileno())
    written = xxhash.xxh3_128()
    with target.open("rb") as again:
        while chunk := again.read(CHUNK_BYTES):
            written.update(chunk)
            lock.beat()
    if target.stat().st_size != file.size:
        raise ModelError(f"model.stage: {source / file.name} changed while it was copied; start again")
    if written.digest() != read.digest():
        raise ModelError(
            f"model.stage: {target} on {socket.gethostname()} is not what was written there; is the disk "
            "damaged? Use another, or leave model.stage out"
        )


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
