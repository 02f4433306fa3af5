"""The preflight ladder: what would fail in the job is said before anything is queued.

Rungs here need files and programs of this machine only; the data set's columns are checked by the
command line, which may import the data room. Each rung returns Findings and raises nothing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from hpc_rl.bus.errors import RedisMissing
from hpc_rl.bus.server import find_binary
from hpc_rl.catalog.facts import ModelFilesError, safetensors_header
from hpc_rl.catalog.local_models import find_snapshot, is_local
from hpc_rl.cluster.findings import Finding
from hpc_rl.cluster.partitions import check_partitions
from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.schema import Recipe

_LOW_SPACE_GB = 2.0
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.pt")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def machine_findings(
    loaded: LoadedRecipe,
    site: Site,
    plan: Plan,
    recipe: Recipe,
    *,
    environ: Mapping[str, str] | None = None,
    which: Callable[[str], str | None] = shutil.which,
) -> list[Finding]:
    """Every rung of this module, in order. `recipe` is the resolved one (`resolve_recipe`)."""
    findings = [Finding("warning", "plan", warning) for warning in plan.warnings]
    findings += check_output_root(recipe.output_root, _key(loaded, "output_root"))
    findings += check_model(loaded, site)
    findings += check_secrets(loaded, os.environ if environ is None else environ)
    findings += check_packages(loaded, site, plan)
    findings += check_redis(loaded)  # every kind has a controller, and so a bus
    findings += check_files(loaded, site, plan)
    if plan.placement in ("het", "shared"):
        programs = check_programs(which)
        findings += programs
        if not any(finding.level == "error" for finding in programs):
            findings += check_partitions(plan)
    return findings


def _key(loaded: LoadedRecipe, *path: str | int) -> str:
    return f"{loaded.where(*path)}: {'.'.join(str(part) for part in path)}"


def check_output_root(output_root: str, where: str = "output_root") -> list[Finding]:
    """Is the folder (or the nearest one above it that exists) writable, and not nearly full?

    Really writes, reads and removes one small file: permission bits do not tell about quotas,
    read-only mounts and root squashing.
    """
    folder = Path(output_root)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        fix = "set output_root to a folder on the shared filesystem"
        return [Finding("error", where, f"{folder} is not a folder", fix)]
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hpc-rl-check-") as handle:
            handle.write(b"hpc-rl")
            handle.flush()
            if Path(handle.name).read_bytes() != b"hpc-rl":
                return [Finding("error", where, f"what is written to {folder} does not read back")]
    except OSError as error:
        message = f"{folder} is not writable ({error.strerror or error})"
        return [
            Finding("error", where, message, "set output_root to a folder of yours on the shared filesystem")
        ]
    free = shutil.disk_usage(folder).free / 2**30
    if free < _LOW_SPACE_GB:
        return [Finding("warning", where, f"only {free:.1f} GiB are free in {folder}")]
    return [Finding("ok", where, f"{folder} is writable")]


def check_model(loaded: LoadedRecipe, site: Site) -> list[Finding]:
    """Config, weights and tokenizer are on this machine, whole, at the recipe's revision."""
    model = loaded.recipe.model
    findings = _repository(loaded, model.path, model.revision, site, "path")
    if any(finding.level == "error" for finding in findings):
        return findings
    folder = _folder(model.path, model.revision, site)
    assert folder is not None
    where = _key(loaded, "model", "path")
    if not (folder / "config.json").is_file():
        return [Finding("error", where, f"{folder} has no config.json", "it must be a Transformers model")]
    findings += _weights(folder, where)
    tokenizer = folder
    if model.tokenizer is not None:
        found = _repository(loaded, model.tokenizer, None, site, "tokenizer")
        findings += found
        other = _folder(model.tokenizer, None, site)
        if other is None or any(finding.level == "error" for finding in found):
            return findings
        tokenizer, where = other, _key(loaded, "model", "tokenizer")
    if not any((tokenizer / name).is_file() for name in _TOKENIZER):
        fix = "set model.tokenizer to a folder or Hub name that has one"
        findings.append(Finding("error", where, f"{tokenizer} has no tokenizer files", fix))
    return findings


def _folder(path: str, revision: str | None, site: Site) -> Path | None:
    if is_local(path):
        return Path(path).expanduser()
    return find_snapshot(path, revision, site.paths.hf_home)


def _repository(loaded: LoadedRecipe, path: str, revision: str | None, site: Site, key: str) -> list[Finding]:
    where = _key(loaded, "model", key)
    folder = _folder(path, revision, site)
    if is_local(path):
        if folder is not None and folder.is_dir():
            return [Finding("ok", where, str(folder))]
        what = "is a file, not a model folder" if folder is not None and folder.exists() else "does not exist"
        return [Finding("error", where, f"{path} {what}")]
    if folder is None:
        at = f" at revision {revision}" if revision else ""
        message = f"{path}{at} is neither a folder nor in the Hub cache, and jobs run offline"
        fix = f"run 'hpc-rl fetch {loaded.path}' where there is internet"
        return [Finding("error", where, message, fix)]
    return [Finding("ok", where, f"{path} is cached ({folder.name[:12]})")]


def _weights(folder: Path, where: str) -> list[Finding]:
    """Weight files are there, and every safetensors file is as long as its header says."""
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
    if not files:
        return [Finding("error", where, f"{folder} has no weights (*.safetensors)")]
    try:
        missing = _missing_shards(folder)
        for file in files:
            if file.suffix == ".safetensors":
                header = safetensors_header(file)
                ends = [item["data_offsets"][1] for name, item in header.items() if name != "__metadata__"]
                with file.open("rb") as handle:
                    prefix = 8 + int.from_bytes(handle.read(8), "little")
                if file.stat().st_size < prefix + max(ends, default=0):
                    return [Finding("error", where, f"{file} is cut short", "copy or fetch it again")]
    except (ModelFilesError, KeyError, TypeError) as error:
        return [Finding("error", where, str(error), "copy or fetch it again")]
    if missing:
        message = (
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more"
            if missing[1:]
            else f"{folder} lacks {missing[0]}"
        )
        return [Finding("error", where, message, "copy or fetch it again")]
    return []


def _missing_shards(folder: Path) -> list[str]:
    import json

    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelFilesError(f"{index} is not an index of weights: {error}") from error
    return sorted(name for name in names if not (folder / name).is_file())


def check_secrets(loaded: LoadedRecipe, environ: Mapping[str, str]) -> list[Finding]:
    """Every named secret is set where the user submits."""
    return [
        Finding(
            "error",
            _key(loaded, "cluster", "secrets", index),
            f"{name} is not set in your environment",
            f"export {name}=... before submitting, or remove it from the list",
        )
        for index, name in enumerate(loaded.recipe.cluster.secrets)
        if not environ.get(name)
    ]


def check_redis(loaded: LoadedRecipe) -> list[Finding]:
    """redis-server can be started (looked for on this machine; the job's node is assumed alike)."""
    try:
        return [Finding("ok", "redis-server", find_binary(loaded.recipe.cluster.controller.redis_server))]
    except RedisMissing as error:
        return [Finding("error", _key(loaded, "cluster", "controller", "redis_server"), str(error))]


def check_programs(which: Callable[[str], str | None] = shutil.which) -> list[Finding]:
    """The Slurm client is installed here."""
    missing = [name for name in ("sbatch", "srun", "scontrol", "squeue", "sinfo") if which(name) is None]
    if not missing:
        return []
    message = f"{', '.join(missing)} not found on PATH: this machine has no Slurm client"
    return [
        Finding("error", "Slurm", message, "submit from a login node, or run here: cluster.placement=local")
    ]


def check_packages(loaded: LoadedRecipe, site: Site, plan: Plan) -> list[Finding]:
    """The engine's and the trainer's packages are in this environment, where the roles will use it."""
    if site.python is not None:
        return []  # another environment, maybe not even readable from here
    findings = []
    needs = {"policy": ["torch", "transformers"]}
    rollout = loaded.recipe.rollout
    if rollout is not None:
        needs["rollout"] = {"vllm": ["vllm"], "hf": ["torch", "transformers"]}.get(rollout.engine, [])
    for role, packages in needs.items():
        if plan.group(role).image is not None:
            continue
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            where = _key(loaded, "rollout", "engine") if role == "rollout" else "policy"
            fix = (
                "pip install 'hpc-rl[vllm]', or rollout.engine=hf"
                if "vllm" in missing
                else "pip install 'hpc-rl[train]'"
            )
            findings.append(Finding("error", where, f"{', '.join(missing)} not installed here", fix))
    return findings


def check_files(loaded: LoadedRecipe, site: Site, plan: Plan) -> list[Finding]:
    """Files that recipe or site name: the template, the interpreter, container images."""
    findings = []
    template = loaded.recipe.cluster.template or site.template
    if template is not None and not Path(template).is_file():
        findings.append(Finding("error", _key(loaded, "cluster", "template"), f"{template} does not exist"))
    if site.python is not None and shutil.which(site.python) is None:
        message = f"site {site.name}: python {site.python} is not executable on this machine"
        findings.append(Finding("warning", "python", message, "it must be on the compute nodes"))
    for group in plan.groups:
        image = group.image
        if image is None:
            continue
        if site.container.runtime == "none":
            message = f"an image is given ({image}), but site {site.name} has no container runtime"
            findings.append(
                Finding("error", f"cluster.{group.role}.image", message, "set the site's container.runtime")
            )
        elif image.startswith("/") and not Path(image).exists():
            findings.append(Finding("error", f"cluster.{group.role}.image", f"{image} does not exist"))
    return findings
