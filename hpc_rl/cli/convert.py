"""`hpc-rl convert`: a cosmos-rl configuration as a recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hpc_rl.recipe.cosmos import Conversion


def convert(
    config: Path = typer.Argument(..., help="A cosmos-rl TOML file."),
    overrides: list[str] = typer.Argument(None, metavar="[a.b=value]...", help="Recipe keys to set."),
    out: Path | None = typer.Option(None, "-o", "--out", help="Write the recipe here; default: print it."),
    script: str | None = typer.Option(None, "--script", help="The launch script it was used with."),
    gpus: int | None = typer.Option(None, "--gpus", min=1, help="What dp_shard_size = -1 means; default 8."),
    force: bool = typer.Option(False, "--force", help="Replace a file that is there."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Convert a cosmos-rl TOML file to a recipe.

    Every key is mapped, or listed as dropped with the reason: on stderr, and as comments in the recipe.
    The recipe loads, or there is none. SFT and RL (GRPO, DAPO, GSPO, AIPO) are converted.

    \b
    Example:
      hpc-rl convert configs/mistral-7b-fsdp4-sft.toml -o mistral.yaml --script dummy_sft.py
      hpc-rl convert phi4-14b-p-fsdp4-r-tp2-grpo.toml --script gsm8k_grpo.py -o phi4.yaml
      hpc-rl convert sft.toml data.train.path=rows.jsonl -o sft.yaml && hpc-rl check sft.yaml
    """
    from hpc_rl.cli._console import note
    from hpc_rl.cli.errors import UserError
    from hpc_rl.recipe.cosmos import convert_file

    target = out.expanduser() if out is not None else None
    if target is not None and target.is_dir():
        raise UserError(f"--out {target} is a folder; name a file in it, such as {target / 'recipe.yaml'}")
    if target is not None and target.exists() and not force:
        raise UserError(f"--out {target} exists already; choose another, or use --force")
    if target is not None and not target.absolute().parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}")
    folder = target.absolute().parent if target is not None else Path.cwd()
    made = convert_file(config, script=script, gpus=gpus, overrides=list(overrides or []), folder=folder)
    if target is not None:
        _write(target, made.text)
    for line in made.lines():
        note(line)
    _print(made, config, target, as_json)


def _print(made: Conversion, config: Path, target: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from hpc_rl.cli._console import note, print_json

    dropped, unknown = made.of("dropped"), made.of("unknown")
    if as_json:
        entries = {
            fate: [entry.as_json() for entry in made.of(fate)] for fate in ("mapped", "dropped", "unknown")
        }
        print_json({
            "config": str(config), "recipe": str(target) if target is not None else None,
            **entries,
            "assumed": [asdict(item) for item in made.assumed], "notes": made.notes, "text": made.text,
        })  # fmt: skip
    elif target is None:
        print(made.text, end="")
    else:
        print(target)
    mapped = len(made.of("mapped"))
    note(f"{mapped} keys mapped, {len(dropped)} dropped, {len(unknown)} unknown to cosmos-rl")
    if target is not None and not as_json:
        note(f"next: hpc-rl check {target}")


def _write(target: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a recipe."""
    from hpc_rl.cli.errors import UserError

    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, target)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UserError(f"--out {target} cannot be written: {error.strerror}") from error
