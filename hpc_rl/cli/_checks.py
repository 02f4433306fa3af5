"""The preflight ladder as the commands use it: warnings shown, errors raised."""

from __future__ import annotations

from hpc_rl.cli._console import note
from hpc_rl.cli._preflight import preflight, require
from hpc_rl.cli._prepare import Prepared
from hpc_rl.cluster.findings import Finding


def findings_of(prepared: Prepared) -> list[Finding]:
    """Everything that was looked at, errors first."""
    return preflight(prepared.loaded, prepared.site, prepared.plan, prepared.recipe)


def require_checks(prepared: Prepared) -> None:
    """Show the warnings; raise PreflightError with every error."""
    findings = findings_of(prepared)
    require(findings)
    for finding in findings:
        if finding.level == "warning":
            note(f"warning: {finding}")
