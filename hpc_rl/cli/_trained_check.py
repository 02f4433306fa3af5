"""What is trained of the model, before the queue: names in `model.lora`, `model.train` and `model.freeze`.

They are names in memory, which only the module itself knows, so it is built on meta, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from hpc_rl.catalog.facts import ModelFilesError, read_json
from hpc_rl.catalog.local_models import find_model
from hpc_rl.cluster.findings import Finding, place
from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.load import LoadedRecipe

LIMIT_S = 120.0  # imports from a cold shared filesystem take most of it
_PACKAGES = ("torch", "transformers", "peft")


def trained_findings(loaded: LoadedRecipe, site: Site, plan: Plan) -> list[Finding]:
    """An error for what the trainer would refuse when it builds the model; nothing where the recipe trains
    it whole and unsplit. Where it cannot be known here, a finding says so."""
    recipe = loaded.recipe
    model, tp = recipe.model, recipe.policy.parallel.tp
    keys = [key for key in ("lora", "train", "freeze") if getattr(model, key)]
    folder = find_model(model.path, model.revision, site.paths.hf_home)
    if not recipe.has_policy:  # an evaluation loads whole weights into the engines alone
        return []
    if recipe.policy.trainer != "fsdp2" or not (keys or tp > 1) or folder is None:
        return []
    where = place(loaded, "model", keys[0]) if keys else place(loaded, "policy", "parallel", "tp")
    reason = _elsewhere(folder, site, plan)
    if reason:
        return [Finding("ok", where, f"not compared with the model's layers: {reason}")]
    asked = {"model": model.model_dump(mode="json") | {"path": str(folder), "revision": None}, "tp": tp}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hpc_rl.models.hf.preflight"],
            input=json.dumps(asked),
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"not compared with the model's layers: building it took more than {LIMIT_S:g} s"
        return [Finding("warning", where, message)]
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [Finding("warning", where, f"not compared with the model's layers: {last}")]
    error = json.loads(done.stdout.splitlines()[-1])["error"]
    if error is not None:
        return [Finding("error", where, error)]
    return [Finding("ok", where, "fits the model's layers")]


def _elsewhere(folder: Path, site: Site, plan: Plan) -> str:
    """Why the module of the run cannot be built here; empty if it can."""
    if site.python is not None or plan.group("policy").image is not None:
        return "the run has another Python environment"
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed here"
    try:
        config = read_json(folder / "config.json")
    except ModelFilesError as error:
        return str(error)
    if {*(config.get("architectures") or []), config.get("model_type")} & set(registry("models").names()):
        return "its class is a plugin's"
    return ""
