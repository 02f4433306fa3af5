"""Where the programs are, and which Debian packages bring those that are missing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hpc_rl.cluster.devcluster.errors import MissingPackages

# Daemons live in sbin, which is not on a normal user's PATH in Debian.
_EXTRA_PATH = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_BASE = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "sbatch": "slurm-client",
    "scontrol": "slurm-client",
    "squeue": "slurm-client",
    "scancel": "slurm-client",
    "sinfo": "slurm-client",
    "munged": "munge",
}
_ACCOUNTING = {
    "slurmdbd": "slurmdbd",
    "sacctmgr": "slurm-client",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "mariadb-admin": "mariadb-client",
}
# The storage plugin is a library, not a program: looked for beside Slurm's other plugins.
_MYSQL_PLUGIN = "accounting_storage_mysql.so"
_SLURM_PREFIXES = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SRUN_",
    "SALLOC_",
    "SQUEUE_",
    "SINFO_",
    "SCANCEL_",
    "SACCT_",
)
_PLUGIN_DIRS = ("/usr/lib", "/usr/lib64", "/usr/local/lib")


def search_path() -> str:
    """PATH with the sbin folders appended."""
    parts = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join([*parts, *(p for p in _EXTRA_PATH if p not in parts)])


def find_programs(*, accounting: bool = False, path: str | None = None) -> dict[str, str]:
    """Absolute paths of all needed programs, looked for on `path` (default: PATH and sbin).

    Raises MissingPackages naming every missing one at once.
    """
    wanted = {**_BASE, **(_ACCOUNTING if accounting else {})}
    found = {name: shutil.which(name, path=path or search_path()) for name in wanted}
    missing = [name for name, path in found.items() if path is None]
    packages = {wanted[name] for name in missing}
    if accounting and not _has_mysql_plugin():
        missing.append(_MYSQL_PLUGIN)
        packages.add("slurm-wlm-mysql-plugin")
    if missing:
        raise MissingPackages(missing, sorted(packages))
    return {name: path for name, path in found.items() if path is not None}


def missing_packages(*, accounting: bool = False) -> list[str]:
    """The Debian packages to install; empty when everything is there."""
    try:
        find_programs(accounting=accounting)
    except MissingPackages as error:
        return error.packages
    return []


def clean_environ() -> dict[str, str]:
    """This process's environment without another Slurm's variables, with sbin on PATH."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_SLURM_PREFIXES)}
    return {**kept, "PATH": search_path()}


def _has_mysql_plugin() -> bool:
    for root in _PLUGIN_DIRS:
        for pattern in ("slurm*/", "*/slurm*/"):
            if any(Path(root).glob(pattern + _MYSQL_PLUGIN)):
                return True
    return False
