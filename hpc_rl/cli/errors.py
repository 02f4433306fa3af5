"""What counts as a user's mistake: typed errors of the rooms, shown without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

EXIT_USER_ERROR = 2

# (module, class). A module that was not imported cannot have raised, so nothing is imported here.
_TYPES = (
    ("hpc_rl.cli.errors", "UserError"),
    ("hpc_rl.cli._fetch", "FetchError"),
    ("hpc_rl.recipe.yaml_source", "RecipeError"),
    ("hpc_rl.recipe.plugins", "PluginError"),
    ("hpc_rl.catalog.facts", "ModelFilesError"),
    ("hpc_rl.cluster.findings", "PreflightError"),
    ("hpc_rl.cluster.slurm.commands", "SlurmError"),
    ("hpc_rl.cluster.devcluster.errors", "DevClusterError"),
    ("hpc_rl.run.paths", "RunError"),
    ("hpc_rl.bus.errors", "BusError"),
    ("hpc_rl.data.errors", "DataError"),
    ("hpc_rl.models.base", "ModelError"),
    ("hpc_rl.checkpoint.export", "ExportError"),
    ("hpc_rl.checkpoint.loader", "CheckpointError"),
    ("hpc_rl.checkpoint.s3", "UploadError"),
)


# Errors that say several things: how to list them.
_LISTS: tuple[tuple[str, str, Callable[[Any], list[str]]], ...] = (
    ("hpc_rl.recipe.yaml_source", "RecipeError", lambda error: [str(part) for part in error.problems]),
    ("hpc_rl.cli._fetch", "FetchError", lambda error: error.problems),
    (
        "hpc_rl.cluster.findings",
        "PreflightError",
        lambda error: [str(part) for part in error.findings if part.level == "error"],
    ),
)


class UserError(ValueError):
    """A mistake in what the user asked for; the message says what to change."""


def user_errors() -> tuple[type[BaseException], ...]:
    """The error types of the rooms imported so far that are reported without a traceback."""
    found = []
    for module, name in _TYPES:
        if module in sys.modules and (kind := vars(sys.modules[module]).get(name)) is not None:
            found.append(kind)
    return tuple(found)


def report(error: BaseException) -> None:
    """The message on stderr, one `error:` for each thing that is wrong."""
    for text in _parts(error):
        print(f"error: {text}", file=sys.stderr)


def _parts(error: BaseException) -> list[str]:
    """One text per mistake: a recipe and the preflight ladder have several, the others one."""
    for module, name, each in _LISTS:
        if module in sys.modules and isinstance(error, vars(sys.modules[module])[name]):
            return each(error)
    return [str(error) or type(error).__name__]
