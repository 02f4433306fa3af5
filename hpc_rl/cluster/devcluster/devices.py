"""Fake GPUs: character devices that gres/gpu accepts as `File=`, so that Slurm hands out device numbers.

Slurm refuses plain files. Root makes its own nodes (clones of /dev/null). A normal user, or root in a
container without CAP_MKNOD, borrows character devices that exist everywhere; Slurm only stats them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from hpc_rl.cluster.devcluster.errors import DevClusterError

_PREFERRED = (
    "null",
    "zero",
    "full",
    "random",
    "urandom",
    "tty",
    "ptmx",
    "console",
    "kmsg",
    "fuse",
    "loop-control",
)


def fake_gpus(folder: Path, count: int) -> list[str]:
    """`count` paths of distinct character devices. `folder` is where root's own nodes are made."""
    if count == 0:
        return []
    made = _make_nodes(folder, count)
    if made is not None:
        return made
    borrowed = _existing_devices()
    if len(borrowed) < count:
        raise DevClusterError(
            f"{count} fake GPUs per node asked for, but only {len(borrowed)} character devices in /dev "
            f"can serve as one ({', '.join(borrowed)}); ask for fewer GPUs, or run as root"
        )
    return borrowed[:count]


def _make_nodes(folder: Path, count: int) -> list[str] | None:
    """Own device nodes, or None where making or using them is not permitted."""
    if os.geteuid() != 0:
        return None
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    paths = [folder / f"gpu{index}" for index in range(count)]
    try:
        for path in paths:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        for path in paths:
            path.unlink(missing_ok=True)
        return None
    return [str(path) for path in paths]


def _existing_devices() -> list[str]:
    """Real character devices (no links, Slurm resolves none) in a fixed order, numbered terminals last."""
    names = list(_PREFERRED) + sorted(entry.name for entry in Path("/dev").glob("tty[0-9]*"))
    found = []
    for name in names:
        path = Path("/dev") / name
        try:
            mode = path.lstat().st_mode
        except OSError:
            continue
        if stat.S_ISCHR(mode):
            found.append(str(path))
    return found
