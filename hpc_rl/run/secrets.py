"""Secrets: named in the recipe, kept in one 0600 file of the run, set by each task inside its own process.

They are never in the script, on a command line, in the job's environment or in a log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from hpc_rl.run.paths import RunDir, RunError, check_private, write_private

# Shorter values would also hide ordinary words of a log.
_MASKED_LENGTH = 6


def store_secrets(run: RunDir, names: Sequence[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """Copy the named variables from the user's environment into the run; the names that are not set.

    A name that is not set now keeps the value that an earlier submission stored.
    """
    environ = os.environ if environ is None else environ
    values = read_secrets(run)
    values = {name: environ.get(name, values.get(name, "")) for name in names}
    values = {name: value for name, value in values.items() if value}
    run.secrets.parent.mkdir(mode=0o700, exist_ok=True)
    write_private(run.secrets, json.dumps(values).encode())
    return [name for name in names if name not in values]


def load_into_environ(run: RunDir, names: Sequence[str]) -> list[str]:
    """Set the named secrets in this process's environment; the values, for masking in reports.

    Raises RunError if the file is open to others.
    """
    values = read_secrets(run)
    found = {name: values[name] for name in names if name in values}
    os.environ.update(found)
    return list(found.values())


def mask(text: str, values: Sequence[str]) -> str:
    """`text` with every secret value replaced by `***`."""
    for value in values:
        if len(value) >= _MASKED_LENGTH:
            text = text.replace(value, "***")
    return text


def read_secrets(run: RunDir) -> dict[str, str]:
    """The stored secrets by name. Raises RunError if the file is open to others or damaged."""
    try:
        check_private(run.secrets)
        values = json.loads(run.secrets.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{run.secrets} is damaged; submit or resume again to write it anew") from error
    return {str(name): str(value) for name, value in values.items()}
