"""`make constraints`: resolve constraints/<flavour>.in into the pinned constraints/<flavour>.txt."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bootstrap import ROOT, ensure_uv, uv_environment

NOTES = {
    "cpu": "# Resolved from constraints/cpu.in (`make constraints`). Names no index: yours is used.\n",
    "gpu": "# UNTESTED: resolved, but no GPU machine has run this set yet. See constraints/gpu.in.\n",
}


def resolve(uv: Path, flavour: str) -> None:
    folder = ROOT / "constraints"
    target, overrides = folder / f"{flavour}.txt", folder / f"{flavour}-overrides.txt"
    command = [uv, "pip", "compile", "-q", folder / f"{flavour}.in", "-p", "3.11", "-o", target, "--upgrade"]
    command += [
        "--no-emit-index-url",
        "--no-annotate",
        "--no-header",
        "--python-platform",
        "x86_64-manylinux_2_28",
    ]
    command += ["--override", overrides] if overrides.exists() else []
    env = uv_environment()
    if flavour == "gpu":
        env.pop("UV_FIND_LINKS", None)  # a folder of CPU wheels must not decide the GPU set
    subprocess.run([str(part) for part in command], check=True, env=env)
    target.write_text(NOTES[flavour] + target.read_text())


if __name__ == "__main__":
    for flavour in ("cpu", "gpu"):
        resolve(ensure_uv(), flavour)
