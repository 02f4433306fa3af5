"""From a recipe to a run directory: load, plan, write. Shared by submit, check, render and resume."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.cli._console import note
from hpc_rl.cluster.sites import load_site
from hpc_rl.plan.make import make_plan, resolve_recipe, write_plan
from hpc_rl.plan.schema import Plan
from hpc_rl.plan.site import Site
from hpc_rl.recipe.dump import dump_resolved, dump_yaml
from hpc_rl.recipe.load import LoadedRecipe, load_recipe, save_plugins
from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import Problem, RecipeError
from hpc_rl.run.paths import RunDir
from hpc_rl.run.secrets import store_secrets


@dataclass
class Prepared:
    """A recipe worked out: `recipe` is the resolved one, `loaded` knows the places for messages."""

    loaded: LoadedRecipe
    site: Site
    plan: Plan
    recipe: Recipe

    @property
    def resolved_text(self) -> str:
        return dump_resolved(self.recipe)


def prepare(
    path: str | Path,
    overrides: Sequence[str],
    *,
    site: str | None = None,
    profile: Site | None = None,
    here: bool = False,
) -> Prepared:
    """Load and plan; nothing is written. `profile` replaces the lookup of the site by name; `here`: for
    the allocation that we are in.

    Raises RecipeError with everything that is wrong, each with file, line and key.
    """
    loaded = load_recipe(path, with_site(overrides, site))
    chosen = profile or site_of(loaded)
    plan = make_plan(loaded, chosen, here=here)
    return Prepared(loaded, chosen, plan, resolve_recipe(loaded, chosen, plan))


def with_site(overrides: Sequence[str], site: str | None) -> list[str]:
    """The overrides, with `--site` as the last of them. Raises RecipeError for an empty name."""
    if site is None:
        return list(overrides)
    if not site.strip():
        text = "is empty; name a site profile (`hpc-rl site list`), or leave the option out"
        raise RecipeError([Problem("--site", "", text)])
    return [*overrides, f"cluster.site={dump_yaml(site).rstrip()}"]  # quoted where YAML would misread it


def site_of(loaded: LoadedRecipe) -> Site:
    """The site profile of a recipe; profiles that cannot be read are warnings unless it is one of them."""
    cluster = loaded.recipe.cluster
    return load_site(
        cluster.site,
        placement=cluster.placement,
        where=loaded.where("cluster", "site"),
        warn=lambda text: note(f"warning: {text}"),
    )


def create_run(prepared: Prepared) -> tuple[RunDir, list[str]]:
    """Make the run directory with everything a job needs; (run, names of secrets that are not set).

    Whole or not at all: if anything cannot be written, the directory is removed again.
    """
    recipe = prepared.recipe
    run = RunDir.create(recipe.output_root, recipe.name, shared=recipe.cluster.shared_run)
    try:
        run.recipe.write_text(_original(prepared.loaded), encoding="utf-8")
        save_plugins(prepared.loaded, run.code)
        missing = write_settings(run, prepared)
    except BaseException:
        discard(run)
        raise
    return run, missing


def write_settings(run: RunDir, prepared: Prepared) -> list[str]:
    """resolved.yaml, plan.json and the secrets' values; the names of secrets that are not set."""
    missing = store_secrets(run, prepared.recipe.cluster.secrets)
    fresh = run.resolved.with_name(f".{run.resolved.name}.{os.getpid()}")
    fresh.write_text(prepared.resolved_text, encoding="utf-8")
    fresh.replace(run.resolved)
    write_plan(prepared.plan, run.plan)
    return missing


def discard(run: RunDir) -> None:
    """Remove a run that never started, and the folder of its name if it was the only one."""
    shutil.rmtree(run.root, ignore_errors=True)
    for folder in (run.root.parent, run.root.parent.parent):
        try:
            folder.rmdir()  # refuses unless empty
        except OSError:
            return


def _original(loaded: LoadedRecipe) -> str:
    """The recipe as the user wrote it, with the overrides of the command line noted above it."""
    head = "".join(f"# override: {text}\n" for text in loaded.overrides)
    return head + loaded.path.read_text(encoding="utf-8")
