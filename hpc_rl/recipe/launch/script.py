"""Launch scripts of cosmos-rl's as plugins: `launch_worker(dataset=…, reward_fns=…, …)` registers its parts.

A script that is listed under `plugins:` and imports `launch_worker` (from here, or from `cosmos_rl`, for
whose names there are stand-ins) is run at import as its author would run it, `if __name__ == "__main__"`
included. Then the recipe can name, for a script `mine.py`:

    data.train.path: plugin:mine        the rows of `dataset` (plugin:mine.val: of `val_dataset`)
    reward: [{name: mine_rewards}]      the sum of `reward_fns`, or {name: mine.NAME} one of them

What cannot be kept is an error where it would change the training, else a warning: docs/convert.md.
"""

from __future__ import annotations

import ast
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.abc import Loader
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any

from hpc_rl.recipe.extensions import register

if TYPE_CHECKING:
    from hpc_rl.recipe.schema import Recipe

HERE = "hpc_rl.recipe.launch"
THEIRS = "cosmos_rl"

# Arguments that would change which samples are trained, and how.
_REFUSED = {
    "dataloader": "rows are handed out one by one, in the order of `seed` (data.train.shuffle)",
    "sampler": "the order of the rows follows `seed` (data.train.shuffle), and a resumed run continues it",
    "batch_sampler": "a step has policy.batch_size samples in the order of `seed`",
    "val_sampler": "evaluations read data.eval in file order (data.eval.limit)",
    "val_batch_sampler": "evaluations read data.eval in file order (data.eval.limit)",
    "hook_fns": "there are no hooks in the training loop: write a trainer or an algorithm as a plugin",
}
_PASSED_OVER = {
    "filter_reward_fns": "algorithm.drop_zero_variance looks at the weighted sum of the recipe's rewards",
    "val_reward_fns": "evaluations have the recipe's rewards",
    "val_data_packer": "the packer of the training makes the prompts of evaluations, too",
    "custom_logger_fns": "metrics are in metrics.jsonl and W&B",
    "args": "arguments of the script are not passed on",
}


class ScriptError(ValueError):
    """A launch script asks for what hpc-rl cannot do; the message says what to do instead."""


@dataclass
class Parts:
    """What a script gave to `launch_worker`."""

    module: str
    dataset: Any = None
    val_dataset: Any = None
    data_packer: Any = None
    reward_fns: list[Callable[..., Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ScriptSource:
    """A dataset of a script's, registered as `data`: `data/script_rows.py` makes rows of it."""

    parts: Parts
    what: Any


_running: list[ModuleType] = []  # the script that is being imported
_parts: dict[str, Parts] = {}
_recipe: list[Recipe] = []  # what the scripts' `config` is made of, once it is known


def launch_worker(
    dataset: Any = None,
    data_packer: Any = None,
    reward_fns: Any = None,
    val_dataset: Any = None,
    **others: Any,
) -> None:
    """Register the parts of a launch script. Raises ScriptError for what cannot be kept."""
    if not _running:
        raise ScriptError(
            "this script is a plugin of hpc-rl: list it under `plugins:` of a recipe, and submit that"
        )
    module = _running[-1]
    name = module.__name__
    for key, value in others.items():
        if value is None:
            continue
        if key in _REFUSED:
            raise ScriptError(f"launch_worker({key}=…) cannot be kept: {_REFUSED[key]}; remove it")
        why = _PASSED_OVER.get(key, "cosmos-rl does not know it either")
        warnings.warn(f"{name}: launch_worker({key}=…) is passed over: {why}", stacklevel=2)
    functions = [reward_fns] if callable(reward_fns) else list(reward_fns or [])
    parts = Parts(name, dataset, val_dataset, data_packer, functions)
    _parts[name] = parts
    _register(module, parts)


def _register(module: ModuleType, parts: Parts) -> None:
    from hpc_rl.recipe.launch.parts import packer_warning, reward_of

    name = parts.module
    for what, suffix in ((parts.dataset, ""), (parts.val_dataset, ".val")):
        if what is not None:
            attribute = f"hpc_rl_dataset{suffix.replace('.', '_')}"
            setattr(module, attribute, ScriptSource(parts, what))
            register("data", f"{name}{suffix}", implementation=f"{name}:{attribute}")
    rewards = {f"{name}_rewards": parts.reward_fns} if parts.reward_fns else {}
    rewards |= {f"{name}.{function.__name__}": [function] for function in parts.reward_fns}
    for reward, functions in rewards.items():
        attribute = "hpc_rl_reward_" + reward.replace(".", "_")
        setattr(module, attribute, reward_of(functions))
        register("rewards", reward, implementation=f"{name}:{attribute}")
    warning = packer_warning(parts.data_packer)
    if warning:
        warnings.warn(f"{name}: {warning}", stacklevel=3)


def bind(recipe: Recipe) -> None:
    """The recipe that the scripts of this process belong to."""
    _recipe[:] = [recipe]


def bound_recipe() -> Recipe:
    """That of `bind`, or of the run whose `code/` a script was imported from (in a scorer process).

    Raises ScriptError before a recipe is known (while scripts are imported).
    """
    if not _recipe:
        from hpc_rl.recipe.dump import read_resolved

        files = [Path(str(sys.modules[name].__file__)) for name in _parts]
        runs = [file.parent.parent / "resolved.yaml" for file in files if file.parent.name == "code"]
        if not runs:
            raise ScriptError("the configuration is not known yet while the script is imported")
        bind(read_resolved(runs[0]))
    return _recipe[-1]


def is_launch_script(path: Path) -> bool:
    """Whether the file at `path` imports `launch_worker`, from us or from cosmos-rl."""
    tree = _tree(path)
    if tree is None:
        return False
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    return any(module.startswith(HERE) or module.partition(".")[0] == THEIRS for module in modules)


def run_script(module: ModuleType, loader: Loader, path: Path) -> None:
    """Execute the script as `module`, and what it has under `if __name__ == "__main__"`.

    Raises ScriptError if it calls `launch_worker` nowhere, or asks it for what cannot be kept.
    """
    from hpc_rl.recipe.launch.stand_ins import install

    install()
    with _run_as(module, path):
        loader.exec_module(module)
        if module.__name__ not in _parts:
            for code in _main_blocks(path):
                exec(code, vars(module))  # the user's own plugin, as `python script.py` would
    if module.__name__ not in _parts:
        raise ScriptError(
            f"{path.name} calls launch_worker neither at its top level nor under `if __name__ == '__main__'`"
        )


@contextmanager
def _run_as(module: ModuleType, path: Path) -> Iterator[None]:
    """Inside, `launch_worker` belongs to `module`, and the script sees no arguments but its own name."""
    arguments, sys.argv = sys.argv, [str(path)]
    _running.append(module)
    _parts.pop(module.__name__, None)
    try:
        yield
    finally:
        _running.pop()
        sys.argv = arguments


def _tree(path: Path) -> ast.Module | None:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (OSError, SyntaxError, ValueError):
        return None  # importing it says what is wrong


def _main_blocks(path: Path) -> list[CodeType]:
    tree = _tree(path)
    blocks = []
    for node in tree.body if tree is not None else []:
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "__name__ == '__main__'",
            "'__main__' == __name__",
        ):
            blocks.append(compile(ast.Module(body=node.body, type_ignores=[]), str(path), "exec"))
    return blocks
