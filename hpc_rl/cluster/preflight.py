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
from hpc_rl.cluster.findings import Finding, place
from hpc_rl.cluster.model_check import check_model
from hpc_rl.cluster.partitions import check_partitions
from hpc_rl.cluster.scoring_check import check_scoring
from hpc_rl.cluster.storage_check import check_storage
from hpc_rl.plan.groups import scoring_roles
from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.extensions import is_served, registry
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.references import MissingAttribute, MissingModule, check_reference
from hpc_rl.recipe.schema import Recipe

_LOW_SPACE_GB = 2.0


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
    findings += file_findings(loaded, site, plan, recipe)
    findings += check_storage(loaded, plan, recipe, which=which)
    findings += check_secrets(loaded, os.environ if environ is None else environ)
    findings += check_packages(loaded, site, plan)
    findings += check_redis(loaded)  # every kind has a controller, and so a bus
    if plan.placement in ("het", "shared"):
        programs = check_programs(which)
        findings += programs
        if not any(finding.level == "error" for finding in programs):
            findings += check_partitions(plan)
    return findings


def file_findings(loaded: LoadedRecipe, site: Site, plan: Plan, recipe: Recipe) -> list[Finding]:
    """The rungs that look at folders and files only: output, model, extensions, template and images."""
    findings = check_output_root(recipe.output_root, place(loaded, "output_root"))
    findings += check_model(loaded, site)
    findings += check_scoring(loaded, site)
    findings += check_extensions(loaded, site, plan)
    return findings + check_files(loaded, site, plan)


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


def check_secrets(loaded: LoadedRecipe, environ: Mapping[str, str]) -> list[Finding]:
    """Every named secret is set where the user submits."""
    return [
        Finding(
            "error",
            place(loaded, "cluster", "secrets", index),
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
        return [Finding("error", place(loaded, "cluster", "controller", "redis_server"), str(error))]


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
    needs = {"policy": ["torch", "transformers"]} if loaded.recipe.has_policy else {}
    rollout = loaded.recipe.rollout
    if rollout is not None:
        needs["rollout"] = {"vllm": ["vllm"], "hf": ["torch", "transformers"]}.get(rollout.engine, [])
        if any(reward["name"] == "math" for reward in loaded.recipe.reward):
            needs["rollout"] = [*needs["rollout"], "math_verify"]
    needs |= {role: ["torch", "transformers"] for role in scoring_roles(loaded.recipe)}
    for role, packages in needs.items():
        if plan.group(role).image is not None:
            continue
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            where = place(loaded, "rollout", "engine") if role == "rollout" else role
            fix = (
                "pip install 'hpc-rl[vllm]', or rollout.engine=hf"
                if "vllm" in missing
                else "pip install 'hpc-rl[train]'"
            )
            findings.append(Finding("error", where, f"{', '.join(missing)} not installed here", fix))
    return findings


def check_extensions(loaded: LoadedRecipe, site: Site, plan: Plan) -> list[Finding]:
    """The implementation of every plugin extension that the recipe uses is where it says it is.

    Its config was imported when the recipe was loaded; the implementation itself may need torch, and is
    looked for in the files. A module that is not here is only said where the role uses this environment.
    """
    recipe, findings = loaded.recipe, []
    used: list[tuple[str, str, str, tuple[str | int, ...]]] = [
        ("trainers", recipe.policy.trainer, "policy", ("policy", "trainer"))
    ]
    if recipe.algorithm:
        used.append(("algorithms", recipe.algorithm["name"], "policy", ("algorithm", "name")))
    if recipe.rollout is not None:
        used.append(("engines", recipe.rollout.engine, "rollout", ("rollout", "engine")))
        if (transport := recipe.rollout.weights.transport) != "auto":
            used.append(("transports", transport, "policy", ("rollout", "weights", "transport")))
        for index, reward in enumerate(recipe.reward):
            role = "reward" if is_served(reward) else "rollout"
            used.append(("rewards", reward["name"], role, ("reward", index, "name")))
    if recipe.simulator is not None:
        used.append(("simulators", recipe.simulator["name"], "rollout", ("simulator", "name")))
    there = {group.role for group in plan.groups}
    used = [member for member in used if member[2] in there]
    references = [(registry(kind).member(name).implementation, role, path) for kind, name, role, path in used]
    for index, reward in enumerate(recipe.reward):
        if reward["name"] == "python":
            references.append((reward["function"], "rollout", ("reward", index, "function")))
    tools = recipe.simulator.get("tools", []) if recipe.simulator is not None else []
    for index, tool in enumerate(tools):
        if isinstance(tool, dict) and tool.get("name") in registry("tools").names():
            at = ("simulator", "tools", index)
            implementation = registry("tools").member(tool["name"]).implementation
            references.append((tool.get("function") or implementation, "rollout", at))
    for reference, role, path in references:
        elsewhere = site.python is not None or plan.group(role).image is not None
        try:
            check_reference(reference)
        except MissingModule as error:
            if not elsewhere:
                findings.append(
                    Finding("error", place(loaded, *path), str(error), "install it, or list it under plugins")
                )
        except MissingAttribute as error:
            findings.append(
                Finding(
                    "error", place(loaded, *path), str(error), "correct the name in the recipe or the plugin"
                )
            )
    return findings


def check_files(loaded: LoadedRecipe, site: Site, plan: Plan) -> list[Finding]:
    """Files that recipe or site name: the template, the interpreter, container images."""
    findings = []
    template = loaded.recipe.cluster.template or site.template
    if template is not None and not Path(template).is_file():
        findings.append(Finding("error", place(loaded, "cluster", "template"), f"{template} does not exist"))
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
