"""The rooms import one way only, and the rooms without torch stay without torch.

The order is the one of the design page; `RANKS` is that order, `NEIGHBOURS` the explicit allow-list of
imports between rooms of equal rank. Imports inside functions count too (they are in the AST).
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hpc_rl"

ORDER: list[set[str]] = [
    {"cli"},
    {"supervisor", "controller", "policy", "rollout", "scoring"},
    {"roles"},
    {"weights", "checkpoint"},
    {"rewards", "simulators", "data", "models"},
    {"algorithms"},
    {"telemetry"},
    {"cluster"},
    {"plan"},
    {"bus"},
    {"run"},
    {"recipe"},
    {"catalog"},
    {"types"},
]
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}

# room -> rooms of the same rank that it may import. The four role rooms meet on the bus only.
NEIGHBOURS: dict[str, set[str]] = {
    "weights": {"checkpoint"},
    "rewards": {"data"},
    "simulators": {"rewards"},
}
SEPARATE = {"supervisor", "controller", "policy", "rollout", "scoring"}

NO_TORCH = [
    "types",
    "catalog",
    "recipe",
    "plan",
    "cluster",
    "run",
    "bus",
    "supervisor",
    "roles",
    "controller",
]
NO_TORCH += ["cli", "telemetry", "simulators"]
# Single modules of torch rooms that the controller and the command line use.
NO_TORCH_MODULES = [
    "hpc_rl.data.rows",
    "hpc_rl.data.order",
    "hpc_rl.data.packing",
    "hpc_rl.data.prompts",
    "hpc_rl.data.prompt_rows",
    "hpc_rl.data.encode",
    "hpc_rl.data.media",
    "hpc_rl.data.stream",
    "hpc_rl.data.token_batches",
    "hpc_rl.algorithms.advantages",
    "hpc_rl.algorithms.config",
    "hpc_rl.algorithms.denominators",
    "hpc_rl.checkpoint.layout",
    "hpc_rl.checkpoint.upload",
    "hpc_rl.checkpoint.upload_check",
    "hpc_rl.checkpoint.download",
    "hpc_rl.checkpoint.cleaning",
    "hpc_rl.checkpoint.checking",
    "hpc_rl.checkpoint.manifest",
    "hpc_rl.checkpoint.writer",
]
HEAVY = ("torch", "transformers", "vllm")


def _modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "_share" not in path.parts]


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _room(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "hpc_rl" and len(parts) > 1 else None


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import of the module at `path`."""
    package = _dotted(path) if path.name == "__init__.py" else _dotted(path).rpartition(".")[0]
    yield from _imports_of(path.read_text(encoding="utf-8"), package)


def _imports_of(source: str, package: str) -> Iterator[tuple[int, str]]:
    """The imports of `source`, a module of `package`: wherever they stand, `import_module` included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            # `from hpc_rl import bus` names the room in the alias.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "hpc_rl" else [base]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def test_every_room_has_a_place_in_the_order() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"_share"} == set(RANKS)


def test_imports_go_one_way() -> None:
    wrong = []
    for path in _modules():
        room = _room(_dotted(path))
        for line, name in _imports(path):
            other = _room(name)
            if room is None or other is None or other not in RANKS or other == room:
                continue
            if RANKS[other] <= RANKS[room] and other not in NEIGHBOURS.get(room, set()):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_role_rooms_never_import_each_other() -> None:
    assert not SEPARATE & set(NEIGHBOURS)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in _modules()
        if (room := _room(_dotted(path))) in SEPARATE
        for line, name in _imports(path)
        if _room(name) in SEPARATE - {room}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_checker_sees_lazy_relative_and_named_imports() -> None:
    source = """
from .paths import RunDir
from .. import plan
def lazy():
    from hpc_rl import bus
    import importlib
    importlib.import_module("hpc_rl.policy")
"""
    found = {name for _, name in _imports_of(source, "hpc_rl.run")}
    assert {"hpc_rl.bus", "hpc_rl.policy", "hpc_rl.run.paths", "hpc_rl.plan"} <= found


def test_no_torch_room_names_a_heavy_package() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in _modules()
        if (room := _room(_dotted(path))) is None or room in NO_TORCH
        for line, name in _imports(path)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", [*NO_TORCH, "modules"])
def test_importing_a_no_torch_room_does_not_import_torch(room: str) -> None:
    """Every module of the room in a fresh interpreter: what it imports, directly or not, has no torch."""
    if room == "modules":
        names = NO_TORCH_MODULES
    else:
        names = [_dotted(path) for path in _modules() if _room(_dotted(path)) == room]
    names = [name for name in names if not name.endswith("__main__")]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [h for h in {HEAVY!r} if h in sys.modules]\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
