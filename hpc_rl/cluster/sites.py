"""Find and read the site profile: by path, by name (the user's folder, then the shipped ones), or `auto`.

The user's own profiles are in `~/.config/hpc-rl/sites/NAME.yaml`; `~/.config/hpc-rl/config.yaml`
may name the default one (`site: NAME`).
"""

from __future__ import annotations

import difflib
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from hpc_rl.plan.site import Site
from hpc_rl.recipe.messages import validate
from hpc_rl.recipe.share import share_dir
from hpc_rl.recipe.yaml_source import Problem, RecipeError, dotted, read_yaml

__all__ = ["Site", "detect_site", "load_site", "readable_sites", "site_files", "user_config_dir"]


def user_config_dir() -> Path:
    """`~/.config/hpc-rl`."""
    return Path.home() / ".config" / "hpc-rl"


def site_files(config_dir: Path | None = None) -> dict[str, Path]:
    """All profiles by name; the user's own win over shipped ones of the same name."""
    folders = [share_dir("site"), (config_dir or user_config_dir()) / "sites"]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.yaml"))]
    return {file.stem: file for file in files}


def readable_sites(
    config_dir: Path | None = None, warn: Callable[[str], None] | None = None
) -> Iterator[tuple[str, Path, Site]]:
    """Every profile as (name, file, profile). A broken one is told to `warn` and left out, so that one
    file cannot stop what has nothing to do with it; without `warn` it raises RecipeError."""
    for name, file in site_files(config_dir).items():
        try:
            yield name, file, read_site(file)
        except RecipeError as error:
            if warn is None:
                raise
            warn(f"site profile left out: {'; '.join(str(problem) for problem in error.problems)}")


def load_site(
    name: str = "auto",
    *,
    placement: str | None = None,
    config_dir: Path | None = None,
    where: str = "",
    warn: Callable[[str], None] | None = None,
) -> Site:
    """The profile called `name`, at the path `name`, or of the cluster we are on (`auto`).

    With the recipe's `placement: local`, `auto` is this machine whatever cluster it belongs to. `where` is
    the place that names the site, for messages; `warn` as for `readable_sites`.

    Raises RecipeError with file, line and key for a bad profile, or listing the names there are.
    """
    if name == "auto":
        name = "local" if placement == "local" else detect_site(config_dir=config_dir, warn=warn)
    looks_like_path = "/" in name or name.endswith((".yaml", ".yml")) or name in (".", "..", "~")
    files = site_files(config_dir)
    if looks_like_path:
        path = Path(name).expanduser()
        if not path.is_file():
            what = "is a folder, not a site profile" if path.is_dir() else "does not exist"
            inside = sorted(file.name for file in path.glob("*.yaml")) if path.is_dir() else []
            hint = (
                f"; there are {', '.join(inside[:8])}"
                if inside
                else f"; known names: {', '.join(sorted(files))}"
            )
            raise RecipeError([Problem(where, "cluster.site", f"{name} {what}{hint}")])
        return read_site(path)
    if name not in files:
        close = difflib.get_close_matches(name, files, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        folder = (config_dir or user_config_dir()) / "sites"
        message = (
            f"no site profile is called {name!r}.{hint} Known: {', '.join(sorted(files))}. "
            f"Your own go to {folder}; 'hpc-rl site init' drafts one"
        )
        raise RecipeError([Problem(where, "cluster.site", message)])
    return read_site(files[name])


def read_site(path: Path) -> Site:
    """Read and validate one profile. Raises RecipeError."""
    source = read_yaml(path)
    site, problems = validate(Site, source.data, source, renames=False)
    if site is None:
        raise RecipeError(problems)
    problems = [Problem(str(source.where(key)), dotted(key), message) for key, message in _mistakes(site)]
    if problems:
        raise RecipeError(problems)
    if site.template is not None:
        site.template = str((path.parent / Path(site.template).expanduser()).resolve())
    return site


def _mistakes(site: Site) -> list[tuple[tuple[str, ...], str]]:
    from hpc_rl.recipe.checks import parse_time

    found: list[tuple[tuple[str, ...], str]] = []
    if site.time_max is not None:
        try:
            parse_time(site.time_max)
        except ValueError as error:
            found.append((("time_max",), f"is {site.time_max!r}; {error}"))
    if site.detect.hostname is not None:
        try:
            re.compile(site.detect.hostname)
        except re.error as error:
            found.append((("detect", "hostname"), f"is not a regular expression: {error}"))
    if site.gpus.style == "none" and site.gpus.per_node and site.placement != "local":
        found.append((("gpus", "style"), f"is 'none' but gpus.per_node is {site.gpus.per_node}; use gres"))
    if site.gpus.style != "none" and not site.gpus.per_node:
        found.append((("gpus", "per_node"), f"is required when gpus.style is {site.gpus.style!r}"))
    return found


def detect_site(
    *,
    config_dir: Path | None = None,
    which: Callable[[str], str | None] = shutil.which,
    hostname: str | None = None,
    warn: Callable[[str], None] | None = None,
) -> str:
    """The name of the profile to use: the user's configured one, else the one that matches this
    cluster, else `local` where there is no sbatch and `generic-gpu` where there is. `warn` as for
    `readable_sites`."""
    configured = _configured(config_dir or user_config_dir())
    if configured is not None:
        return configured
    if which("sbatch") is None:
        return "local"
    host = hostname or socket.getfqdn()
    cluster: str | None = None
    asked = False
    for name, _, site in readable_sites(config_dir, warn):
        detect = site.detect
        if detect.hostname is not None and re.match(detect.hostname, host):
            return name
        if detect.cluster_name is not None:
            if not asked:
                cluster, asked = _cluster_name(which), True
            if detect.cluster_name == cluster:
                return name
    return "generic-gpu"


def _configured(config_dir: Path) -> str | None:
    file = config_dir / "config.yaml"
    if not file.is_file():
        return None
    source = read_yaml(file)
    unknown = sorted(set(source.data) - {"site"})
    if unknown:
        where = str(source.where((unknown[0],)))
        raise RecipeError([Problem(where, unknown[0], "unknown key. Allowed here: site")])
    name = source.data.get("site")
    if name is not None and not isinstance(name, str):
        where = str(source.where(("site",)))
        raise RecipeError([Problem(where, "site", "must be the name of a site profile")])
    return name


def _cluster_name(which: Callable[[str], str | None]) -> str | None:
    """`ClusterName` of this Slurm, or None when scontrol does not answer in 10 seconds."""
    scontrol = which("scontrol")
    if scontrol is None:
        return None
    try:
        command = [scontrol, "show", "config"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"^ClusterName\s*=\s*(\S+)", done.stdout, re.MULTILINE)
    return match[1] if match else None
