"""`hpc-rl render`: the job script of a recipe, exactly as submit would write it."""

from __future__ import annotations

from pathlib import Path

import typer


def render(
    recipe: str = typer.Argument(..., help="A recipe file, or the name of a shipped recipe."),
    overrides: list[str] = typer.Argument(None, metavar="[a.b=value]...", help="Keys to change."),
    site: str | None = typer.Option(None, "--site", help="Site profile: a name or a file (cluster.site)."),
    run_dir: Path | None = typer.Option(None, "--run-dir", help="The run directory written into the script."),
    as_json: bool = typer.Option(False, "--json", help="Print plan and script as one JSON object."),
) -> None:
    """Print the job script of a recipe. Needs no Slurm, checks no file, writes nothing.

    \b
    Example:
      hpc-rl render recipe.yaml --site my-cluster > job.sbatch
      hpc-rl render gsm8k-grpo cluster.rollout.nodes=8
    """
    from hpc_rl.cli._console import note, print_json
    from hpc_rl.cli._prepare import prepare
    from hpc_rl.cli._start import script_text
    from hpc_rl.cli.errors import UserError

    prepared = prepare(recipe, list(overrides or []), site=site)
    if prepared.plan.placement == "local":
        raise UserError(
            "placement local has no job script: the run starts on this machine. For a script choose a "
            "site with Slurm (--site NAME; `hpc-rl site list`), or cluster.placement=het"
        )
    default = Path(prepared.recipe.output_root) / prepared.recipe.name / "RUN_ID"
    script = script_text(prepared, (run_dir or default).absolute())
    for warning in prepared.plan.warnings:
        note(f"warning: {warning}")
    if as_json:
        print_json({"plan": prepared.plan.model_dump(mode="json"), "script": script})
    else:
        print(script, end="")
