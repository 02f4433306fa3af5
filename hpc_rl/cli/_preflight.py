"""The whole preflight ladder, for `check` and `submit`: the machine, then the data set's rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_rl.catalog.local_models import find_snapshot, hub_cache
from hpc_rl.cluster.findings import Finding, PreflightError, place
from hpc_rl.cluster.preflight import file_findings, machine_findings
from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.schema import DatasetSpec, Recipe

ROWS_CHECKED = 100


def preflight(loaded: LoadedRecipe, site: Site, plan: Plan, recipe: Recipe) -> list[Finding]:
    """Everything that was found, errors first. Nothing is written but one short-lived file."""
    findings = machine_findings(loaded, site, plan, recipe) + data_findings(loaded, site)
    return _sorted(findings + upload_findings(loaded))


def files_preflight(loaded: LoadedRecipe, site: Site, plan: Plan, recipe: Recipe) -> list[Finding]:
    """What a dry run looks at: files and folders. Nothing of Slurm and of installed packages, for the job
    may be meant for another machine, and nothing that imports torch (the Hub's data library does)."""
    findings = file_findings(loaded, site, plan, recipe) + data_findings(loaded, site, light=True)
    return _sorted(findings + upload_findings(loaded, light=True))


def _sorted(findings: list[Finding]) -> list[Finding]:
    rank = {"error": 0, "warning": 1, "ok": 2}
    return sorted(findings, key=lambda finding: rank[finding.level])


def upload_findings(loaded: LoadedRecipe, *, light: bool = False) -> list[Finding]:
    """The secrets of uploads are named and (unless `light`) may really write."""
    if loaded.recipe.checkpoint.upload_hub is None and loaded.recipe.checkpoint.upload_s3 is None:
        return []
    from hpc_rl.checkpoint.upload_check import access_findings, secret_findings

    findings = secret_findings(loaded)
    return findings if light or findings else access_findings(loaded, os.environ)


def require(findings: list[Finding]) -> None:
    """Raise PreflightError if any finding is an error."""
    if any(finding.level == "error" for finding in findings):
        raise PreflightError(findings)


def data_findings(loaded: LoadedRecipe, site: Site, *, light: bool = False) -> list[Finding]:
    """The data sets are here, and the first rows have the columns that the recipe names.

    `light`: of a data set that only the Hub's library can open, see no more than that it is in the cache.
    """
    data = loaded.recipe.data
    findings = _rows(loaded, site, data.train, "train", light)
    if data.eval is not None:
        findings += _rows(loaded, site, data.eval, "eval", light)
    return findings


def _rows(loaded: LoadedRecipe, site: Site, spec: DatasetSpec, which: str, light: bool) -> list[Finding]:
    from hpc_rl.data.errors import DataError
    from hpc_rl.data.prompts import check_rows
    from hpc_rl.data.rows import find_path, load_rows

    where, sft = place(loaded, "data", which), loaded.recipe.kind == "sft"
    try:
        path = find_path(spec.path, None)
        if light and (path is None or (path / "dataset_info.json").exists()):
            return _cached(loaded, site, spec, where) if path is None else [Finding("ok", where, str(path))]
        with _as_in_the_job(site):
            rows = load_rows(spec)
            check_rows(rows, spec, sft=sft, max_rows=ROWS_CHECKED)
    except DataError as error:
        return [Finding("error", where, str(error))]
    found = [Finding("ok", where, f"{len(rows)} rows of {rows.name}")]
    if which == "train" and len(rows) < (wanted := rows_per_step(loaded.recipe)):
        message = f"{len(rows)} rows, and one step takes {wanted}: a step has the same rows more than once"
        fix = "raise data.train.limit" if spec.limit is not None else "give more rows"
        found.append(Finding("warning", where, message, f"{fix}, or lower policy.batch_size"))
    return found


def _cached(loaded: LoadedRecipe, site: Site, spec: DatasetSpec, where: str) -> list[Finding]:
    """A data set of the Hub: downloaded, or prepared by its library in an earlier run."""
    prepared = hub_cache(site.paths.hf_home).parent / "datasets"
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", prepared))
    owner = spec.path.partition("/")[0]
    snapshot = find_snapshot(spec.path, spec.revision, site.paths.hf_home, kind="datasets")
    if snapshot is not None or any(prepared.glob(f"{owner}*")):
        return [Finding("ok", where, f"{spec.path} is cached")]
    message = f"{spec.path} is neither a path nor in the Hub cache, and jobs run offline"
    return [Finding("error", where, message, f"run 'hpc-rl fetch {loaded.path}' where there is internet")]


def rows_per_step(recipe: Recipe) -> int:
    """Rows of the training data in one optimizer step: each makes a sequence, or (rl) a prompt group."""
    per_row = recipe.algorithm.get("group_size", 1) if recipe.kind == "rl" else 1
    return max(1, recipe.policy.batch_size // per_row)


@contextmanager
def _as_in_the_job(site: Site) -> Iterator[None]:
    """Look where the job will look: in the site's cache, offline. (The Hub's libraries read these names
    when they are first imported, which happens inside.)"""
    names = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if site.paths.hf_home is not None:
        names["HF_HOME"] = site.paths.hf_home
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
