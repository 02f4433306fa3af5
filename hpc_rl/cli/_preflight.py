"""The whole preflight ladder, for `check` and `submit`: the machine, then the data set's rows."""

from __future__ import annotations

import os

from hpc_rl.cli._data_check import data_findings
from hpc_rl.cli._trained_check import trained_findings
from hpc_rl.cluster.findings import Finding, PreflightError
from hpc_rl.cluster.preflight import file_findings, machine_findings
from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.load import LoadedRecipe
from hpc_rl.recipe.schema import Recipe


def preflight(loaded: LoadedRecipe, site: Site, plan: Plan, recipe: Recipe) -> list[Finding]:
    """Everything that was found, errors first. Nothing is written but one short-lived file."""
    findings = machine_findings(loaded, site, plan, recipe) + data_findings(loaded, site)
    findings += upload_findings(loaded)
    if not any(finding.level == "error" for finding in findings):  # it takes seconds
        findings += trained_findings(loaded, site, plan)
    return _sorted(findings)


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
