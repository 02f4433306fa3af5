"""`hpc-rl check`: everything that submit checks, without starting anything."""

from __future__ import annotations

import typer


def check(
    recipe: str = typer.Argument(..., help="A recipe file, or the name of a shipped recipe."),
    overrides: list[str] = typer.Argument(None, metavar="[a.b=value]...", help="Keys to change."),
    site: str | None = typer.Option(None, "--site", help="Site profile: a name or a file (cluster.site)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Run every check of submit: schema, arithmetic, files, columns, disk, Slurm's own opinion.

    Exit code 0 if the recipe could be submitted, 2 if not. Nothing is written or queued.

    \b
    Example:
      hpc-rl check recipe.yaml
      hpc-rl check gsm8k-grpo --site my-cluster --json
    """
    from dataclasses import asdict

    from hpc_rl.cli._checks import findings_of
    from hpc_rl.cli._console import print_json
    from hpc_rl.cli._prepare import prepare
    from hpc_rl.cli._summary import plan_summary
    from hpc_rl.cli.errors import EXIT_USER_ERROR

    prepared = prepare(recipe, list(overrides or []), site=site)
    findings = findings_of(prepared)
    passed = all(finding.level != "error" for finding in findings)
    if as_json:
        plan = prepared.plan.model_dump(mode="json")
        print_json({"ok": passed, "findings": [asdict(finding) for finding in findings], "plan": plan})
    else:
        print(plan_summary(prepared.plan))
        print()
        for finding in findings:
            print(f"{finding.level:8}{finding}")
        print("ready to submit" if passed else "not ready: see the errors above")
    if not passed:
        raise typer.Exit(EXIT_USER_ERROR)
