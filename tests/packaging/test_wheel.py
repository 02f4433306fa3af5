"""The wheel carries templates, recipes and sites: installed in an empty environment elsewhere, it renders."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from bootstrap import ensure_uv, uv_environment  # noqa: E402

pytestmark = pytest.mark.slow


def run(*argv: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in argv],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_renders_a_shipped_recipe_in_an_empty_environment(tmp_path: Path) -> None:
    uv, env = ensure_uv(), uv_environment()
    build = [uv, "build", "--wheel", "--no-build-isolation", "--python", sys.executable]
    run(*build, "-o", tmp_path / "dist", ROOT, cwd=tmp_path, env=env)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(uv, "venv", "-q", "--python", sys.executable, tmp_path / "venv", cwd=tmp_path, env=env)
    python = tmp_path / "venv" / "bin" / "python"
    run(uv, "pip", "install", "-q", "-p", python, wheel, "-c", ROOT / "constraints" / "cpu.txt",
        cwd=tmp_path, env=env)  # fmt: skip
    outside = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    where = run(python, "-c", "import hpc_rl; print(hpc_rl.__file__)", cwd=tmp_path, env=outside)
    assert where.startswith(str(tmp_path)), "the installed package, not the checkout"
    torch_there = run(python, "-c", "import importlib.util as u; print(u.find_spec('torch'))", cwd=tmp_path)
    assert torch_there.strip() == "None", "the base install is light"
    hpc_rl = tmp_path / "venv" / "bin" / "hpc-rl"
    script = run(hpc_rl, "render", "gsm8k-grpo", "--site", "generic-gpu", cwd=tmp_path, env=outside)
    assert script.startswith("#!/bin/bash")
    assert "#SBATCH hetjob" in script
    assert "--job-name=gsm8k-grpo:rollout" in script
