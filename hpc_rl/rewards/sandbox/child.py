"""The confined process: `python -I child.py JOB`. It runs `solution.py` of its folder and is told no more.

JOB is JSON: `mode` is `program` (the file is run, with the process's own stdin and stdout) or `calls` (the
file is loaded, and what it defines can be called: one JSON object per line on stdin and stdout). Whatever
the solution does to this process, it can only answer: tests and expected outputs are not here.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import IO, Any


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, here)
    import confine
    import values

    sys.path.remove(here)
    job = json.loads(sys.argv[1])
    folder = job["folder"]
    with open(os.path.join(folder, "solution.py"), encoding="utf-8") as file:
        source = file.read()
    calls = job["mode"] == "calls"
    lines, out = _channels() if calls else (None, None)
    os.chdir(folder)
    confine.limit(job["memory_bytes"], job["cpu_s"], job["file_bytes"])
    confine.confine(folder, _readable())
    sys.argv = ["solution.py"]
    if lines is not None and out is not None:
        Served(values, lines, out).serve(_load(source, "solution"))
    else:
        _load(source, "__main__")


def _channels() -> tuple[IO[str], IO[str]]:
    """The wire under other numbers, so that the solution's own reads and prints do not go there."""
    lines = os.fdopen(os.dup(0), "r", encoding="utf-8")
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return lines, out


def _readable() -> list[str]:
    """What Python and its packages need to see."""
    paths = [sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), "/usr", "/lib", "/lib64"]
    paths += [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path]
    return [*paths, "/etc/ld.so.cache", "/etc/localtime", "/sys/devices/system/cpu", "/proc/meminfo"]


def _load(source: str, name: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    return module.__dict__


class Served:
    """Objects of the solution by number, and the loop that calls them."""

    def __init__(self, values: Any, lines: IO[str], out: IO[str]) -> None:
        self._values = values
        self._lines = lines
        self._out = out
        self._objects: list[Any] = []

    def serve(self, namespace: dict[str, Any]) -> None:
        public = {name: value for name, value in namespace.items() if not name.startswith("_")}
        self._write({"names": {name: self._number(v) for name, v in public.items() if callable(v)}})
        for line in self._lines:
            try:
                reply = self._answer(json.loads(line))
            except Exception as error:  # noqa: BLE001 -- the solution may raise anything; it is the answer
                reply = {"error": [type(error).__name__, str(error)[:1000]]}
            self._write(reply)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        target = self._objects[request["target"]]
        if "name" in request:
            return {"value": self._encode(getattr(target, request["name"]))}
        args = [self._decode(item) for item in request["args"]]
        named = {key: self._decode(item) for key, item in request["named"].items()}
        value = self._encode(target(*args, **named))
        after = [self._encode(item) for item in args]
        changed = [[i, item] for i, item in enumerate(after) if item != request["args"][i]]
        return {"value": value, "changed": changed}

    def _write(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def _number(self, value: Any) -> int:
        self._objects.append(value)
        return len(self._objects) - 1

    def _encode(self, value: Any) -> Any:
        return self._values.encode(value, self._number)

    def _decode(self, item: Any) -> Any:
        return self._values.decode(item, self._objects.__getitem__)


if __name__ == "__main__":
    main()
