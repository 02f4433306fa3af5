"""Plugins of a recipe: modules, or `.py` files that are copied into the run and imported from there.

A plugin registers its members with `hpc_rl.recipe.extensions.register` when it is imported. A file
`my_reward.py` is imported as the module `my_reward`, so its references read `my_reward:MyReward`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

from hpc_rl.recipe.launch.script import is_launch_script, run_script

_imported: dict[str, Path] = {}  # module name -> the file we imported it from


class PluginError(ValueError):
    """A plugin is missing, badly named or cannot be imported."""


def plugin_source(path: str) -> tuple[str, str] | None:
    """`(NAME, REST)` of a data path `plugin:NAME` or `plugin:NAME:REST`: rows that a plugin registered as
    `data`. None for other paths."""
    kind, mark, rest = path.partition(":")
    if kind != "plugin" or not mark:
        return None
    name, _, rest = rest.partition(":")
    return name, rest


def is_file_plugin(name: str) -> bool:
    return name.endswith(".py") or "/" in name


def locate(name: str, folder: Path) -> Path:
    """The file of a `.py` plugin, relative to `folder` (or to its `code/`, inside a run directory)."""
    path = Path(os.path.expanduser(name))
    candidates = [path] if path.is_absolute() else [folder / path, folder / "code" / path.name]
    for candidate in candidates:
        if candidate.is_file():
            found = candidate.resolve()
            break
    else:
        raise PluginError(f"plugin file {str(candidates[0])!r} does not exist")
    if found.suffix != ".py" or not found.stem.isidentifier():
        raise PluginError(f"plugin file {found.name!r} must be named like a Python module, NAME.py")
    if found.stem in sys.stdlib_module_names or found.stem == "hpc_rl":
        raise PluginError(f"plugin file {found.name!r} has the name of an existing module; rename it")
    return found


def import_plugin(plugin: str | Path) -> None:
    """Import one plugin: a Path is a file, text is a module name. Raises PluginError."""
    try:
        if isinstance(plugin, Path):
            _import_file(plugin)
        else:
            importlib.import_module(plugin)
    except PluginError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's module raises while it is imported
        cause = f"{type(error).__name__}: {error}"
        raise PluginError(f"plugin {str(plugin)!r} cannot be imported: {cause}") from error


def _import_file(path: Path) -> None:
    name = path.stem
    if _imported.get(name) == path and name in sys.modules:
        return
    if name not in _imported and _is_installed(name):
        raise PluginError(f"plugin file {path.name!r} has the name of an installed module; rename it")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin file {str(path)!r} cannot be read as a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _imported[name] = path
    try:
        if is_launch_script(path):
            run_script(module, spec.loader, path)
        else:
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name], _imported[name]
        raise


def _is_installed(name: str) -> bool:
    """True if `import name` would give a module of this environment. The working folder, which Python may
    put on its path, does not count: the plugin's original may well lie there."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return False
    if spec.origin is None or name in sys.modules:
        return True
    return not Path(spec.origin).resolve().is_relative_to(Path.cwd()) or "site-packages" in spec.origin


def import_plugins(names: list[str], code_dir: Path) -> None:
    """Import a run's plugins in any process: files from `code_dir` (`<run>/code`), modules by name."""
    for name in names:
        import_plugin(locate(Path(name).name, code_dir) if is_file_plugin(name) else name)


def copy_plugins(plugins: list[str | Path], code_dir: Path) -> None:
    """Copy the `.py` plugins into `code_dir`, which is made if needed."""
    code_dir.mkdir(parents=True, exist_ok=True)
    for plugin in plugins:
        if isinstance(plugin, Path) and plugin.parent != code_dir.resolve():
            shutil.copyfile(plugin, code_dir / plugin.name)
