"""Where the shipped templates, recipes and site profiles are: in a checkout, or inside the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Kind = Literal["templates", "recipes", "site"]


def share_dir(kind: Kind) -> Path:
    """The folder of shipped `kind`. Raises FileNotFoundError when the installation is incomplete."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_share" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"hpc-rl is installed without its {kind}/ folder; reinstall the package")
