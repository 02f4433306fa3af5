"""`make setup`: from a bare Debian 12 with Python 3.11 to a working `.venv/bin/hpc-rl`.

Standard library only, since it runs before anything is installed. Steps, each skipped when its stamp
under `.setup/` says it is done: Debian packages (installed as root; named when missing otherwise), uv in
an environment of its own, the pinned packages of `constraints/<flavour>.txt`, the CPU shim, hpc-rl itself.
Package indexes and wheel folders come from the user's own pip or uv settings; none is named here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".setup"
VENV = ROOT / ".venv"
UV_VERSION = "0.13.8"
# package -> a program it brings, looked for on PATH and in the sbin folders
SYSTEM_PACKAGES = {
    "redis-server": "redis-server",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurm-client": "sbatch",
    "munge": "munged",
    "slurmdbd": "slurmdbd",
    "mariadb-server": "mariadbd",
    "iproute2": "ip",
}
LIBRARY_PACKAGES = ["slurm-wlm-mysql-plugin"]  # brings no program; goes with slurmdbd
NEEDED = "redis-server"  # without Slurm the `local` placement still works; without Redis nothing does
TORCH_HELP = """\
hpc-rl setup: torch==2.13.0+cpu cannot be found with your pip/uv settings.
  PyPI does not carry CPU builds of torch for Linux. Tell pip or uv where one is, then run `make setup` again:
    UV_FIND_LINKS=<folder or page with torch-2.13.0+cpu-cp311-...whl>      (or PIP_FIND_LINKS), or
    UV_EXTRA_INDEX_URL=<the CPU package index named on PyTorch's install page>  (or pip's extra-index-url)."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def find_program(name: str) -> str | None:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin:/sbin"
    return shutil.which(name, path=path)


def run(argv: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in argv], check=True, **options)


def install_system_packages() -> None:
    """Install what is missing as root; otherwise name it exactly and go on with what is there."""
    missing = [package for package, program in SYSTEM_PACKAGES.items() if find_program(program) is None]
    if not missing:
        return
    if "slurmdbd" in missing:
        missing += LIBRARY_PACKAGES
    if os.geteuid() == 0 and shutil.which("apt-get"):
        say(f"installing Debian packages: {' '.join(missing)}")
        quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "stdout": subprocess.DEVNULL}
        # A policy-rc.d that refuses: the packages' own daemons are not ours to start.
        try:
            with no_daemons():
                run(["apt-get", "update", "-qq"], **quiet)
                run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], **quiet)
        except subprocess.CalledProcessError as error:
            sys.exit(f"setup: apt-get failed ({error.returncode}); install by hand: {' '.join(missing)}")
        return
    say(f"missing Debian packages: {' '.join(missing)}")
    say(f"  an administrator installs them with: apt-get install {' '.join(missing)}")
    if NEEDED in missing:
        say("  redis-server is needed by every run; without root: conda install -c conda-forge redis-server")
    if {"slurmctld", "slurmd", "munge", "slurm-client"} & set(missing):
        say("  without Slurm the devcluster cannot start; runs use `placement: local`")


class no_daemons:
    """While packages are installed, `/usr/sbin/policy-rc.d` forbids their daemons to start."""

    path = Path("/usr/sbin/policy-rc.d")

    def __enter__(self) -> None:
        self.ours = not self.path.exists()
        if self.ours:
            self.path.write_text("#!/bin/sh\nexit 101\n")
            self.path.chmod(0o755)

    def __exit__(self, *exc_info: object) -> None:
        if self.ours:
            self.path.unlink(missing_ok=True)


def pip_setting(name: str) -> str:
    """A setting of the user's pip: environment first, then its configuration files."""
    value = os.environ.get("PIP_" + name.upper().replace("-", "_"))
    if value:
        return value
    for scope in (f"global.{name}", f"install.{name}"):
        answer = subprocess.run(
            [sys.executable, "-m", "pip", "config", "get", scope], capture_output=True, text=True, check=False
        )
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.strip()
    return ""


def uv_environment() -> dict[str, str]:
    """uv does not read pip's settings; hand them over unless uv has its own."""
    env = dict(os.environ)
    for ours, pips in (
        ("UV_FIND_LINKS", "find-links"),
        ("UV_DEFAULT_INDEX", "index-url"),
        ("UV_INDEX", "extra-index-url"),
    ):
        value = " ".join(
            part
            for part in pip_setting(pips).split()
            if not part.startswith("file:") or Path(part.removeprefix("file://")).is_dir()
        )
        if ours not in env and value and not (ours == "UV_INDEX" and "UV_EXTRA_INDEX_URL" in env):
            env[ours] = value.replace(" ", ",") if ours == "UV_FIND_LINKS" else value
    env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    env.setdefault("UV_LINK_MODE", "copy")
    certificate = pip_setting("cert")
    if certificate:
        env.setdefault("SSL_CERT_FILE", certificate)
    return env


def ensure_uv() -> Path:
    uv = STATE / "uv" / "bin" / "uv"
    if uv.exists() and UV_VERSION in subprocess.run([uv, "--version"], capture_output=True, text=True).stdout:
        return uv
    say(f"installing uv {UV_VERSION} into .setup/uv")
    run([sys.executable, "-m", "venv", STATE / "uv"])
    run(
        [
            STATE / "uv" / "bin" / "python",
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            f"uv=={UV_VERSION}",
        ]
    )
    return uv


def digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def install_packages(uv: Path, flavour: str) -> None:
    pins, overrides = (
        ROOT / "constraints" / f"{flavour}.txt",
        ROOT / "constraints" / f"{flavour}-overrides.txt",
    )
    inputs = [path for path in (pins, overrides, ROOT / "pyproject.toml", Path(__file__)) if path.exists()]
    inputs += sorted((ROOT / "tools" / "cpu").glob("hpcrl_*")) if flavour == "cpu" else []
    stamp, wanted = STATE / f"packages-{flavour}", digest(*inputs)
    if stamp.exists() and stamp.read_text() == wanted and (VENV / "bin" / "hpc-rl").exists():
        return
    env = uv_environment()
    if not (VENV / "bin" / "python").exists():
        run([uv, "venv", "-q", "--python", sys.executable, VENV], env=env)
    python = VENV / "bin" / "python"
    if flavour == "cpu":
        probe = [uv, "pip", "install", "-p", python, "--dry-run", "--no-deps", "-q", "torch==2.13.0+cpu"]
        answer = subprocess.run([str(part) for part in probe], env=env, capture_output=True, text=True)
        if answer.returncode != 0:
            sys.exit(
                TORCH_HELP + "\n  uv said: " + (answer.stderr.strip().splitlines() or ["nothing"])[-1].strip()
            )
    say(f"installing the pinned packages of constraints/{flavour}.txt (about 3 GB; minutes on a first run)")
    started = time.monotonic()
    command = [uv, "pip", "install", "-q", "-p", python, "--compile-bytecode", "-r", pins]
    command += ["--override", overrides] if overrides.exists() else []
    run(command, env=env)
    # `--no-build-isolation`: the pinned hatchling is in the environment, nothing else is fetched.
    run([uv, "pip", "install", "-q", "-p", python, "--no-deps", "--no-build-isolation", "-e", ROOT], env=env)
    if flavour == "cpu":
        install_cpu_shim(python)
    say(f"packages ready after {time.monotonic() - started:.0f} s")
    stamp.write_text(wanted)


def install_cpu_shim(python: Path) -> None:
    """See tools/cpu/hpcrl_cpu_torchvision.py: only the CPU set-up needs it, so only it gets it."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site_packages = run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    for source in sorted((ROOT / "tools" / "cpu").glob("hpcrl_*")):
        shutil.copy(source, site_packages)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--flavour", choices=["cpu", "gpu"], default="cpu", help="which pinned set (gpu: untested)"
    )
    arguments = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        sys.exit(
            f"setup: Python 3.11 is needed for the pinned set; this is {sys.version.split()[0]}. "
            "Set PYTHON=/path/to/python3.11 for make."
        )
    STATE.mkdir(exist_ok=True)
    install_system_packages()
    install_packages(ensure_uv(), arguments.flavour)
    # A quick start needs byte code; PYTHONDONTWRITEBYTECODE does not stop compileall.
    run([VENV / "bin" / "python", "-m", "compileall", "-q", ROOT / "hpc_rl"])
    say("ready: .venv/bin/hpc-rl")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup: this command failed with code {error.returncode}: {' '.join(map(str, error.cmd))}")
