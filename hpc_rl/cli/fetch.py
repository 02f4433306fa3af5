"""`hpc-rl fetch`: model, tokenizer and data into the site's cache, on a login node."""

from __future__ import annotations

import typer


def fetch(
    recipe: str = typer.Argument(..., help="A recipe file, or the name of a shipped recipe."),
    overrides: list[str] = typer.Argument(None, metavar="[a.b=value]...", help="Keys to change."),
    site: str | None = typer.Option(None, "--site", help="Site profile: a name or a file (cluster.site)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON list."),
) -> None:
    """Download what a recipe names and is not here yet: jobs run with the Hub offline.

    Gated access and free space are checked before the first byte. Revisions are pinned: what is printed
    goes into the recipe as model.revision and data.*.revision.

    \b
    Example:
      hpc-rl fetch gsm8k-grpo
      hpc-rl fetch recipe.yaml --site my-cluster --json
    """
    from dataclasses import asdict

    from hpc_rl.cli._console import note, print_json, table
    from hpc_rl.cli._fetch import fetch as fetch_all
    from hpc_rl.cli._prepare import site_of, with_site
    from hpc_rl.recipe.load import load_recipe

    loaded = load_recipe(recipe, with_site(overrides or [], site))
    done = fetch_all(loaded, site_of(loaded), say=note)
    if as_json:
        print_json([asdict(item) for item in done])
        return
    rows = [[item.key, item.name, item.commit or "-", item.folder] for item in done]
    typer.echo(table(["key", "name", "revision", "folder"], rows))
