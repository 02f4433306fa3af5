"""Is there anything at `module:attribute`? Told from files, without importing what may need torch or vLLM."""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from hpc_rl.recipe.messages import nearest


class MissingModule(ValueError):
    """The module of a reference is not in this environment (it may be in the one of the job)."""


class MissingAttribute(ValueError):
    """The module is here, and has no such attribute."""


def check_reference(reference: str) -> None:
    """Raise MissingModule or MissingAttribute if `reference` leads nowhere.

    A module that is imported already is asked; of any other the source is read. What cannot be told from
    the source (a compiled module, `from x import *`, a module `__getattr__`) is taken as it is.
    """
    module_name, _, attribute = reference.partition(":")
    names: set[str] | None
    if module_name in sys.modules:
        module = sys.modules[module_name]
        names = None if "__getattr__" in vars(module) else set(vars(module))
    else:
        spec = _find(module_name)
        if spec is None:
            raise MissingModule(f"there is no module {module_name!r} here")
        names = _names_in(Path(spec.origin)) if spec.origin and spec.origin.endswith(".py") else None
    if names is not None and attribute.partition(".")[0] not in names:
        guess = nearest(attribute, sorted(names))
        hint = f" (did you mean {guess!r}?)" if guess else ""
        raise MissingAttribute(f"module {module_name!r} has no {attribute!r}{hint}")


def _find(module_name: str) -> ModuleSpec | None:
    """The spec of a module; unlike importlib's own, this imports none of its parent packages."""
    parts = module_name.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
    except ValueError:  # a module whose __spec__ is None, such as __main__
        return None
    for end in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:end]), list(spec.submodule_search_locations))
    return spec


def _names_in(file: Path) -> set[str] | None:
    """The names that a source file binds at its top level (also below `if` and `try`); None: cannot tell."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue  # what is bound inside is no name of the module
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending.extend(ast.iter_child_nodes(node))
    return None if names & {"*", "__getattr__"} else names
