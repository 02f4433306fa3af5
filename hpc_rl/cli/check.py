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

    Exit code 0 if the recipe could be submitted, 2 if not. Errors are on stderr, with --json on stdout as
    well. Nothing is written or queued.

    \b
    Example:
      hpc-rl check recipe.yaml
      hpc-rl check gsm8k-grpo --site my-cluster --json
    """
    from dataclasses import asdict

    from hpc_rl.cli._checks import errors, findings_of, tell_errors
    from hpc_rl.cli._console import print_json
    from hpc_rl.cli._prepare import prepare
    from hpc_rl.cli._summary import plan_summary
    from hpc_rl.cli.errors import EXIT_USER_ERROR
    from hpc_rl.cluster.findings import Finding
    from hpc_rl.recipe.yaml_source import RecipeError

    try:
        prepared = prepare(recipe, list(overrides or []), site=site)
    except RecipeError as error:
        if as_json:  # the object is there whatever is wrong
            found = [Finding("error", f"{p.where}: {p.key}".strip(": "), p.message) for p in error.problems]
            print_json({"ok": False, "findings": [asdict(finding) for finding in found], "plan": None})
        raise
    findings = findings_of(prepared)
    failed = errors(findings)
    if as_json:
        plan = prepared.plan.model_dump(mode="json")
        print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings], "plan": plan})
    else:
        print(plan_summary(prepared.plan))
        print()
        for finding in findings:
            if finding.level != "error":
                print(f"{finding.level:8}{finding}")
        print("not ready: see the errors" if failed else "ready to submit")
    tell_errors(findings)
    if failed:
        raise typer.Exit(EXIT_USER_ERROR)
