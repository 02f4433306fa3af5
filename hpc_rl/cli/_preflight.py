"""The whole preflight ladder, for `check` and `submit`: the machine, then the data set's rows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from hpc_rl.cluster.findings import Finding, PreflightError
from hpc_rl.cluster.preflight import machine_findings
from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.schema import DatasetSpec, Recipe

ROWS_CHECKED = 100


def preflight(loaded: LoadedRecipe, site: Site, plan: Plan, recipe: Recipe) -> list[Finding]:
    """Everything that was found, errors first. Nothing is written but one short-lived file."""
    findings = machine_findings(loaded, site, plan, recipe)
    findings += data_findings(loaded, site)
    rank = {"error": 0, "warning": 1, "ok": 2}
    return sorted(findings, key=lambda finding: rank[finding.level])


def require(findings: list[Finding]) -> None:
    """Raise PreflightError if any finding is an error."""
    if any(finding.level == "error" for finding in findings):
        raise PreflightError(findings)


def data_findings(loaded: LoadedRecipe, site: Site) -> list[Finding]:
    """The data sets are here, and the first rows have the columns that the recipe names."""
    data = loaded.recipe.data
    findings = _rows(loaded, site, data.train, "train", sft=loaded.recipe.kind == "sft")
    if data.eval is not None:
        findings += _rows(loaded, site, data.eval, "eval", sft=loaded.recipe.kind == "sft")
    return findings


def _rows(loaded: LoadedRecipe, site: Site, spec: DatasetSpec, which: str, *, sft: bool) -> list[Finding]:
    from hpc_rl.data.errors import DataError
    from hpc_rl.data.rows import check_rows, load_rows

    where = f"{loaded.where('data', which)}: data.{which}"
    try:
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
