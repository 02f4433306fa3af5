"""The writer process: puts the staging buffer on disk as it is. No torch.

    python -m hpc_rl.checkpoint.writer FD PARENT

FD is an inherited memory file (memfd) that the trainer fills (`image`). Requests come as lines of JSON on
stdin, answers go to stdout; nothing is pickled. A process of its own, because a writing thread holds the
interpreter that training needs; direct writes, because copying 1.6 GB into the page cache costs seconds
of a core that training needs as well, and dirty pages stall everyone. It ends when its stdin closes or
PARENT is gone, in the middle of a file if need be.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import xxhash

CHUNK = 8 << 20
PACE = 64 << 20  # where direct writes are not possible: dirty pages are kept below this
PAGE = 4096
RESERVE = 16 << 20  # left free for metrics, events and logs


class Request(msgspec.Struct):
    """Write the first `nbytes` of the buffer to `folder`/`file`; the account goes to `report` beside it.

    Without `file`: make the pages of the buffer real, so that staging never waits for them. `layout`
    (encoded pieces) is null when it is the same as before. `stage` is a local file to write first.
    """

    nbytes: int
    folder: str = ""
    file: str = ""
    report: str = ""
    digest: str = ""
    layout: msgspec.Raw = msgspec.Raw(b"null")
    stage: str | None = None


class Report(msgspec.Struct):
    """What one rank wrote, or why it could not: read by rank 0. `pieces` are those of `entries.Piece`."""

    file: str = ""
    nbytes: int = 0
    xxh3: str = ""
    digest: str = ""
    error: str = ""
    pieces: msgspec.Raw = msgspec.Raw(b"[]")


class Answer(msgspec.Struct):
    """`file` is the one that was asked for (empty: the pages are real). `note` is for the log."""

    file: str = ""
    seconds: float = 0.0
    error: str = ""
    note: str = ""


class Orphaned(RuntimeError):
    """The trainer is gone; nobody will finish this checkpoint."""


def map_buffer(handle: int, nbytes: int) -> mmap.mmap:
    """The first `nbytes` of the memory file, in huge pages where the system has them for shared memory."""
    buffer = mmap.mmap(handle, nbytes)
    with suppress(OSError):  # a kernel without them: small pages do as well, only slower
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def make_real(buffer: mmap.mmap) -> None:
    """Fault every page in, here rather than while the trainer stages."""
    populate = 23  # MADV_POPULATE_WRITE, Linux 5.14; not in Python's mmap yet
    try:
        buffer.madvise(populate)
    except OSError:
        for start in range(0, len(buffer), PAGE):
            buffer[start] = buffer[start]


def open_file(folder: int, name: str) -> tuple[int, bool]:
    """A new file for writing, and whether writes go past the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(name, flags | os.O_DIRECT, 0o666, dir_fd=folder), True
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: tmpfs and others without direct writes
            raise
        return os.open(name, flags, 0o666, dir_fd=folder), False


def put(
    folder: int, name: str, read: Callable[[int, int], memoryview], nbytes: int, alive: Callable[[], None]
) -> str:
    """Write `nbytes` to a new, synced file `name` in the open `folder`; its checksum.

    `read(start, end)` gives the bytes of whole pages. A file that could not be written
    is removed: on a full disk, what is left of it would be in the way of the next save.
    """
    state = xxhash.xxh3_64()
    handle, direct = open_file(folder, name)
    try:
        dirty = 0
        for start in range(0, nbytes, CHUNK):
            alive()
            end = min(start + CHUNK, nbytes)
            block = read(start, -(-end // PAGE) * PAGE)
            direct = _put_chunk(handle, block if direct else block[: end - start], start, direct)
            state.update(block[: end - start])
            dirty += 0 if direct else end - start
            if dirty >= PACE:
                os.fdatasync(handle)
                os.posix_fadvise(handle, 0, end, os.POSIX_FADV_DONTNEED)
                dirty = 0
        os.ftruncate(handle, nbytes)
        os.fsync(handle)
    except BaseException:
        with suppress(FileNotFoundError):  # the whole folder was removed
            os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(handle)
    return state.hexdigest()


def _put_chunk(handle: int, block: memoryview, at: int, direct: bool) -> bool:
    """Write one chunk at `at`; whether the next one can be written directly, too."""
    done = 0
    while done < len(block):
        try:
            done += os.pwrite(handle, block[done:], at + done)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:
                raise
            # Some filesystems take O_DIRECT at opening and refuse the write; or a short write ended
            # off a page's boundary.
            fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~os.O_DIRECT)
            direct = False
    return direct


def _require_room(folder: int, nbytes: int, name: str) -> None:
    """A file that cannot fit is not begun: a disk that is full to the last byte stops others, too.

    (Quotas do not show here; the write itself finds them.)
    """
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < nbytes + RESERVE:
        words = f"{os.strerror(errno.ENOSPC)}: {nbytes / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free"
        raise OSError(errno.ENOSPC, words, name)


class Writer:
    """Serves one trainer. `parent` is its process id."""

    def __init__(self, handle: int, parent: int) -> None:
        self._handle, self._parent = handle, parent
        self._buffer: mmap.mmap | None = None
        self._layout = msgspec.Raw(b"[]")

    def serve(self, request: Request) -> Answer:
        began = time.monotonic()
        if bytes(request.layout) != b"null":
            self._layout = request.layout.copy()
        if not request.file:
            if request.nbytes:
                make_real(self._map(request.nbytes))
            return Answer(seconds=time.monotonic() - began)
        note = self._write(request)
        return Answer(request.file, time.monotonic() - began, note=note)

    def _map(self, nbytes: int) -> mmap.mmap:
        room = -(-nbytes // PAGE) * PAGE
        if self._buffer is None or len(self._buffer) < room:
            self._buffer = map_buffer(self._handle, room)
        return self._buffer

    def _write(self, request: Request) -> str:
        """Data first, then the report, both through the open folder: it may be moved aside meanwhile."""
        os.makedirs(request.folder, exist_ok=True)
        folder = os.open(request.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            report = Report(request.file, request.nbytes, digest=request.digest, pieces=self._layout)
            note = ""
            if request.nbytes:
                _require_room(folder, request.nbytes, request.folder)
                data = memoryview(self._map(request.nbytes))
                if request.stage is not None:
                    report.xxh3, note = self._through(Path(request.stage), folder, request, data)
                else:
                    read = lambda start, end: data[start:end]  # noqa: E731
                    report.xxh3 = put(folder, request.file, read, request.nbytes, self._alive)
            self._report(folder, request.report, report)
            os.fsync(folder)
        finally:
            os.close(folder)
        return note

    def _through(self, local: Path, folder: int, request: Request, data: memoryview) -> tuple[str, str]:
        """Write to the node's own disk first, then move; straight away if there is no room on it."""
        read = lambda start, end: data[start:end]  # noqa: E731
        try:
            local.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            near = os.open(local.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                _require_room(near, request.nbytes, str(local.parent))
                put(near, local.name, read, request.nbytes, self._alive)
            finally:
                os.close(near)
        except OSError as error:
            note = f"not staged in {local.parent}: {error.strerror}"
            return put(folder, request.file, read, request.nbytes, self._alive), note
        try:
            with local.open("rb") as file, mmap.mmap(-1, CHUNK) as bounce:

                def load(start: int, end: int) -> memoryview:
                    block = memoryview(bounce)[: end - start]
                    file.seek(start)
                    count = file.readinto(block)
                    block[count:] = bytes(end - start - count)  # behind the end of the file
                    return block

                return put(folder, request.file, load, request.nbytes, self._alive), ""
        finally:
            local.unlink()

    def _report(self, folder: int, name: str, report: Report) -> None:
        """Atomically, through the open folder."""
        temporary = f"{name}.{os.getpid()}"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666, dir_fd=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.json.encode(report))
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)

    def _alive(self) -> None:
        if os.getppid() != self._parent:
            raise Orphaned


def main(handle: int, parent: int) -> None:
    os.nice(5)  # the trainer's and the sampler's threads come first
    # A warning on stdout would break the protocol.
    answers, sys.stdout = sys.stdout, sys.stderr
    writer = Writer(handle, parent)
    for line in sys.stdin:
        request = msgspec.json.decode(line, type=Request)
        try:
            answer = writer.serve(request)
        except Orphaned:
            return
        except Exception as error:  # noqa: BLE001 -- reported to the trainer, which decides
            traceback.print_exc()
            answer = Answer(request.file, error=f"{type(error).__name__}: {error}"[:500])
        print(msgspec.json.encode(answer).decode(), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
