"""`hpc-rl site`: the profiles that say what a cluster is like."""

from __future__ import annotations

from pathlib import Path

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_sites(as_json: bool = typer.Option(False, "--json", help="Print one JSON list.")) -> None:
    """List the site profiles there are, and mark the one that `cluster.site: auto` takes here.

    \b
    Example:
      hpc-rl site list
    """
    from hpc_rl.cli._console import note, print_json, table
    from hpc_rl.cluster.sites import detect_site, readable_sites

    warnings: list[str] = []
    profiles = sorted(readable_sites(warn=warnings.append), key=lambda profile: profile[0])
    here = detect_site(warn=warnings.append)
    for warning in dict.fromkeys(warnings):
        note(f"warning: {warning}")
    if as_json:
        print_json(
            [
                {
                    "name": name,
                    "file": str(path),
                    "placement": site.placement,
                    "auto": name == here,
                    "description": site.description,
                    "partitions": site.partitions,
                }
                for name, path, site in profiles
            ]
        )
        return
    rows = [
        ["*" if name == here else "", name, site.placement, site.description, path]
        for name, path, site in profiles
    ]
    typer.echo(table(["auto", "name", "placement", "description", "file"], rows))


@app.command("init")
def init(
    name: str | None = typer.Argument(None, help="Name of the profile; default: the cluster's name."),
    stdout: bool = typer.Option(False, "--stdout", help="Print the draft instead of writing it."),
    force: bool = typer.Option(False, "--force", help="Replace a profile of that name."),
) -> None:
    """Draft a profile of this cluster from sinfo and scontrol, for you to look over.

    \b
    Example:
      hpc-rl site init
      hpc-rl site init my-cluster --stdout
    """
    import yaml

    from hpc_rl.cli._console import note
    from hpc_rl.cli.errors import UserError
    from hpc_rl.cluster.sites import read_site, user_config_dir
    from hpc_rl.cluster.slurm.site_init import draft_site

    text = draft_site(name)
    if stdout:
        typer.echo(text, nl=False)
        return
    path: Path = user_config_dir() / "sites" / f"{name or yaml.safe_load(text)['name']}.yaml"
    if path.exists() and not force:
        raise UserError(f"{path} exists already; --force replaces it, --stdout only prints")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    read_site(path)  # the draft must be a profile that we accept ourselves
    print(path)
    note(
        "look it over (partitions per role, gpus, network), then try: hpc-rl check RECIPE --site " + path.stem
    )
