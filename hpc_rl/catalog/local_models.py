"""Find a model's files on this machine: a folder, or a snapshot in the Hugging Face cache. No network."""

from __future__ import annotations

import os
import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}\Z")


def hub_cache(hf_home: str | None = None) -> Path:
    """The Hub cache below `hf_home` (the site's), else where huggingface_hub itself looks."""
    if hf_home is not None:
        return Path(hf_home).expanduser() / "hub"
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    home = os.environ.get("HF_HOME")
    base = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return base.expanduser() / "hub"


def is_local(path: str) -> bool:
    """True for a path of this machine, False for a name on the Hub (`org/name`)."""
    return path.startswith(("/", ".", "~"))


def find_snapshot(
    name: str, revision: str | None, hf_home: str | None = None, kind: str = "models"
) -> Path | None:
    """The snapshot folder of a Hub repository at `revision` (null: main), or None if not cached.

    `kind` is `models` or `datasets`.
    """
    folder = hub_cache(hf_home) / f"{kind}--{name.replace('/', '--')}"
    wanted = revision or "main"
    if _COMMIT.match(wanted):
        commit = wanted
    else:
        ref = folder / "refs" / wanted
        if not ref.is_file():
            return None
        commit = ref.read_text().strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def find_model(path: str, revision: str | None = None, hf_home: str | None = None) -> Path | None:
    """The folder that holds the model's `config.json`, or None when it is not on this machine."""
    if is_local(path):
        folder = Path(path).expanduser()
        return folder if (folder / "config.json").is_file() else None
    snapshot = find_snapshot(path, revision, hf_home)
    return snapshot if snapshot is not None and (snapshot / "config.json").is_file() else None
