"""The trusted side of the sandbox: runs a program on one input, or calls what it defines.

A program is a new process each time, in an empty private folder that is removed afterwards, with the limits
of `Limits` and confined by `confine.py`. Its environment holds nothing of ours.
"""

from __future__ import annotations

import builtins
import json
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hpc_rl.rewards.sandbox.confine import supported
from hpc_rl.rewards.sandbox.values import decode, encode

CHILD = Path(__file__).with_name("child.py")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What one process may use: seconds on the clock (and of computing), address space, bytes of output,
    which is also the largest file that it may write."""

    seconds: float
    memory_bytes: int
    output_bytes: int


class Ended(BaseException):
    """The confined process is at its end, or beyond a limit. No Exception: tests that expect the solution to
    raise one must not take this for it."""


class SolutionError(Exception):
    """The solution raised an exception that is none of Python's own."""


@contextmanager
def _started(
    source: str, mode: str, limits: Limits, stdin: int | IO[bytes], stderr: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """The process, killed at the end. It stays in our process group: whoever kills that kills it too."""
    with tempfile.TemporaryDirectory(prefix="hpc-rl-code-", ignore_cleanup_errors=True) as folder:
        Path(folder, "solution.py").write_text(source, encoding="utf-8", errors="replace")
        job = {
            "mode": mode,
            "folder": folder,
            "memory_bytes": limits.memory_bytes,
            "cpu_s": math.ceil(limits.seconds),
            "file_bytes": limits.output_bytes,
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-X", "utf8", str(CHILD), json.dumps(job)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=folder,
            env=_environment(folder),
        )
        try:
            yield process
        finally:
            process.kill()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    _close(stream)
            process.wait()


def _close(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except BrokenPipeError:  # what was not read goes nowhere
        return


def _environment(folder: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **threads, **kept}


def why_not(limits: Limits) -> str | None:
    """Why no process can be confined on this machine; None if one was, and could compute."""
    problem = supported()
    if problem is not None:
        return problem
    with _started("print(6 * 7)", "program", limits, subprocess.DEVNULL, subprocess.PIPE) as process:
        try:
            output, errors = process.communicate(timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return f"a confined process did not end within {limits.seconds:g} s"
    if output == b"42\n":
        return None
    return f"a confined process failed: {errors.decode(errors='replace').strip()[-300:]}"


def run_program(source: str, stdin: str, limits: Limits) -> str | None:
    """What `source` prints when it is run on `stdin`; None if it fails, or goes beyond a limit."""
    output, end = _run(source, stdin, limits, subprocess.DEVNULL)
    return output.decode(errors="replace") if end == "ok" else None


def run_script(source: str, limits: Limits) -> tuple[str, str]:
    """What `source` prints, its errors included, and how it ended: `ok`, `failed`, or at a limit (`time`,
    `output`)."""
    output, end = _run(source, "", limits, subprocess.STDOUT)
    return output[: limits.output_bytes].decode(errors="replace"), end


def _run(source: str, stdin: str, limits: Limits, stderr: int) -> tuple[bytes, str]:
    deadline = time.monotonic() + limits.seconds
    output = bytearray()
    with tempfile.TemporaryFile() as file:
        file.write(stdin.encode())
        file.seek(0)
        with _started(source, "program", limits, file, stderr) as process:
            assert process.stdout is not None
            try:
                while chunk := _read(process.stdout.fileno(), deadline):
                    output += chunk
                    if len(output) > limits.output_bytes:
                        return bytes(output), "output"
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except (Ended, subprocess.TimeoutExpired):
                return bytes(output), "time"
    return bytes(output), "ok" if code == 0 else "failed"


def _read(pipe: int, deadline: float) -> bytes:
    """Some bytes, none at the end. Raises Ended after the deadline."""
    left = deadline - time.monotonic()
    if left <= 0 or not select.select([pipe], [], [], left)[0]:
        raise Ended("the time is over")
    return os.read(pipe, _CHUNK)


def _write(pipe: int, data: bytes, deadline: float) -> None:
    """All of `data`. Raises Ended after the deadline, and where nobody reads."""
    os.set_blocking(pipe, False)
    while data:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([], [pipe], [], left)[1]:
            raise Ended("the time is over")
        try:
            data = data[os.write(pipe, data) :]
        except BrokenPipeError as error:
            raise Ended("the solution has ended") from error


class Session:
    """A loaded solution. `names` are the functions and classes it defines, to be called like local ones.

    Raises Ended where the solution does not load, or later ends, hangs or writes too much.
    """

    names: dict[str, Remote]

    def __init__(self, source: str, limits: Limits) -> None:
        self._deadline = time.monotonic() + limits.seconds
        self._limit = limits.output_bytes
        self._context = _started(source, "calls", limits, subprocess.PIPE)
        self._rest = b""

    def __enter__(self) -> Session:
        self._process = self._context.__enter__()
        try:
            defined = self._reply()["names"]
            self.names = {str(name): Remote(self, int(number)) for name, number in defined.items()}
        except BaseException as error:
            self._context.__exit__(type(error), error, error.__traceback__)
            if isinstance(error, (ValueError, TypeError, KeyError, AttributeError, RecursionError)):
                raise Ended("the solution answered nonsense") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)

    def get(self, target: int, name: str) -> Any:
        reply = self._ask({"target": target, "name": name})
        return self._read_of(reply, ())

    def call(self, target: int, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The result; arguments that the solution changed in place are changed here as well."""
        request = {
            "target": target,
            "args": [encode(value, _number) for value in args],
            "named": {key: encode(value, _number) for key, value in named.items()},
        }
        return self._read_of(self._ask(request), args)

    def _read_of(self, reply: dict[str, Any], args: tuple[Any, ...]) -> Any:
        try:
            for index, item in reply.get("changed", []):
                _replace(args[index], self._decode(item))
            return self._decode(reply["value"])
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise Ended("the solution answered nonsense") from error

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        _write(self._process.stdin.fileno(), json.dumps(request).encode() + b"\n", self._deadline)
        try:
            reply = self._reply()
            if "error" not in reply:
                return reply
            name, text = reply["error"]
            kind = vars(builtins).get(name)
        except (ValueError, TypeError, RecursionError) as error:
            raise Ended("the solution answered nonsense") from error
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, UnicodeError):
            raise kind(text)
        raise SolutionError(f"{name}: {text}")

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            if len(self._rest) > self._limit:
                raise Ended("the solution wrote too much")
            chunk = _read(self._process.stdout.fileno(), self._deadline)
            if not chunk:
                raise Ended("the solution has ended")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        reply = json.loads(line)
        if not isinstance(reply, dict):
            raise ValueError("no reply")
        return reply

    def _decode(self, item: Any) -> Any:
        return decode(item, lambda number: Remote(self, number))


class Remote:
    """A function, class or object of the solution. It is equal to nothing but itself, and has no truth."""

    __slots__ = ("_number", "_session")

    def __init__(self, session: Session, number: int) -> None:
        self._session = session
        self._number = number

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._session.call(self._number, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._session.get(self._number, name)

    def __bool__(self) -> bool:
        raise TypeError("the solution returned no plain data")


def _number(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"tests can give plain data to the solution, and not {type(value).__name__}")


def _replace(old: Any, new: Any) -> None:
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
