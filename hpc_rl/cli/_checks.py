"""The preflight ladder as the commands use it: warnings shown, errors raised."""

from __future__ import annotations

import sys
from pathlib import Path

from hpc_rl.cli._console import note
from hpc_rl.cli._preflight import preflight, require
from hpc_rl.cli._prepare import Prepared
from hpc_rl.cluster.findings import Finding


def findings_of(prepared: Prepared, *, here: bool = False) -> list[Finding]:
    """Everything that was looked at, errors first. `here`: no job is submitted, so Slurm is not asked."""
    plan = prepared.plan
    if here:  # the ladder asks of a run without a job what holds in an allocation too: no partitions
        plan = plan.model_copy(update={"placement": "local"})
    findings = preflight(prepared.loaded, prepared.site, plan, prepared.recipe)
    if prepared.plan.placement in ("het", "shared") and not here and not errors(findings):
        findings = [_slurm_opinion(prepared), *findings]
    return findings


def tell_errors(findings: list[Finding]) -> None:
    """Every error on stderr, after what stdout has."""
    sys.stdout.flush()
    for finding in findings:
        if finding.level == "error":
            note(f"error: {finding}")


def tell_warnings(findings: list[Finding]) -> None:
    """Every warning on stderr."""
    sys.stdout.flush()
    for finding in findings:
        if finding.level == "warning":
            note(f"warning: {finding}")


def errors(findings: list[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def _slurm_opinion(prepared: Prepared) -> Finding:
    """`sbatch --test-only`: refuses what plain sbatch, on many clusters, would queue for ever."""
    from hpc_rl.cli._start import job_folder, job_script
    from hpc_rl.cluster.slurm.commands import SlurmError
    from hpc_rl.cluster.slurm.testonly import try_submit
    from hpc_rl.run.paths import RunDir

    run = RunDir(Path(prepared.recipe.output_root) / prepared.recipe.name / "RUN_ID")
    try:
        trial = try_submit(job_script(prepared, run, 1), job_folder(run, 1))
    except (SlurmError, ValueError) as error:
        return Finding("error", "sbatch --test-only", str(error))
    when = f"could start at {trial.start}" if trial.start else "Slurm takes the job"
    return Finding("ok", "sbatch --test-only", when + (f" on {trial.nodes}" if trial.nodes else ""))


def require_checks(prepared: Prepared, *, here: bool = False) -> None:
    """Show the warnings; raise PreflightError with every error."""
    findings = findings_of(prepared, here=here)
    require(findings)
    tell_warnings(findings)
