"""`hpc-rl`: the command line. One module per command, imported only when it is asked for.

Nothing here imports pydantic, submitit, rich or torch, so that `--help` and bad input answer at once.
The typed errors of the rooms (`errors.py`) become lines on stderr and exit code 2; an
error of any other type is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import typer

from hpc_rl import __version__
from hpc_rl.cli.errors import EXIT_USER_ERROR, report, user_errors

# command -> (module, help in a line); the order is that of `hpc-rl --help`.
COMMANDS: dict[str, tuple[str, str]] = {
    "submit": ("submit", "Check a recipe, make its run directory and start it."),
    "check": ("check", "Run every check that submit runs, and start nothing."),
    "render": ("render", "Print the job script of a recipe."),
    "fetch": ("fetch", "Download model, tokenizer and data on a login node."),
    "resume": ("resume", "Continue a run from its run directory alone."),
    "status": ("status", "Show what a run does, and why it failed."),
    "list": ("list_runs", "List your runs."),
    "logs": ("logs", "Show the logs of a run."),
    "cancel": ("cancel", "End a run, at once or after a checkpoint."),
    "export": ("export", "Write a checkpoint as safetensors."),
    "eval": ("eval", "Evaluate one checkpoint in a small job of its own."),
    "upload": ("upload", "Store checkpoints and exports in S3 or on the Hub."),
    "verify": ("verify", "Compare checkpoints with what was written."),
    "clean": ("clean", "Remove what a run no longer needs."),
    "convert": ("convert", "Turn a cosmos-rl configuration into a recipe."),
    "site": ("site", "Draft and list site profiles."),
    "devcluster": ("devcluster", "A private real Slurm on this machine."),
}
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def build_app(command: str | None) -> typer.Typer:
    """The Typer app with one command loaded, or with all of them (for `--help` and mistyped names)."""
    app = typer.Typer(
        name="hpc-rl",
        help="Slurm-native post-training of Hugging Face models.\n\nA RUN is named by its directory, its "
        "recipe name (the latest run) or its Slurm job id.",
        epilog="Example: hpc-rl submit recipe.yaml policy.steps=100 --follow",
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=CONTEXT,
    )
    app.callback()(_options)
    for name in [command] if command in COMMANDS else COMMANDS:
        _add(app, name)
    return app


def _add(app: typer.Typer, name: str) -> None:
    module_name, help_line = COMMANDS[name]
    module = importlib.import_module(f"hpc_rl.cli.{module_name}")
    if isinstance(vars(module).get("app"), typer.Typer):  # a command with sub-commands
        app.add_typer(module.app, name=name, help=help_line)
    else:
        app.command(name, short_help=help_line, context_settings=CONTEXT)(vars(module)[module_name])


def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and leave.", is_eager=True),
) -> None:
    if version:
        typer.echo(f"hpc-rl {__version__}")
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    try:
        build_app(command)(arguments, prog_name="hpc-rl")
    except user_errors() as error:  # evaluated only now: names the types of the rooms loaded so far
        report(error)
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
