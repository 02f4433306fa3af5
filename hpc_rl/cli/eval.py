"""`hpc-rl eval`: one checkpoint, evaluated by itself in a small job of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hpc_rl.cli._evaluated import Target
    from hpc_rl.cli._prepare import Prepared
    from hpc_rl.run.paths import RunDir


def eval(
    target: str = typer.Argument(
        ..., metavar="RUN|FOLDER", help="A run, or a folder: a checkpoint, an export, any model."
    ),
    overrides: list[str] = typer.Argument(
        None, metavar="[a.b=value]...", help="Keys to change for this evaluation."
    ),
    step: str | None = typer.Option(
        None, "--step", metavar="N|best|final", help="Which one of a run; default: final, else the newest."
    ),
    recipe: str | None = typer.Option(
        None, "--recipe", help="For a model folder of no run: data.eval and rewards are from this recipe."
    ),
    site: str | None = typer.Option(None, "--site", help="Another site profile than the run's."),
    here: bool = typer.Option(False, "--here", help="Run inside this Slurm allocation (salloc)."),
    local: bool = typer.Option(False, "--local", help="Run on this machine, without Slurm."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print plan, recipe and script; write nothing."),
    follow: bool = typer.Option(False, "--follow", help="Wait for the result and print it."),
    show: bool = typer.Option(False, "--list", help="Print the evaluations that this run has; start none."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object (with --list: a list)."),
) -> None:
    """Evaluate one checkpoint on data.eval, as a job of its own: no training, and for RL no policy nodes.

    RL runs get rewards and pass@k (eval.samples, eval.temperature), SFT runs the validation loss; with a
    reward, SFT runs generate answers and get both rewards and pass@k. A checkpoint that was not exported is
    exported by the job. Results go to RUN/eval/: evaluation.json and samples/evaluation.jsonl.

    \b
    Example:
      hpc-rl eval gsm8k-grpo --step best --follow
      hpc-rl eval gsm8k-grpo --step 300 eval.samples=8 eval.temperature=1 rollout.replicas=4
      hpc-rl eval my-sft 'reward=[{name: math}]' rollout.max_tokens=2048
      hpc-rl eval ~/models/Qwen2.5-7B --recipe gsm8k-grpo --local --follow
      hpc-rl eval gsm8k-grpo --list
    """
    from hpc_rl.cli._evaluated import find_target

    if show:
        from hpc_rl.run.index import find_run

        print_list(find_run(target), as_json)
        return
    found = find_target(target, step)
    changed = list(overrides or [])
    if here:
        from hpc_rl.cli._start import allocation_placement

        changed.append(f"cluster.placement={allocation_placement()}")
    elif local:
        changed.append("cluster.placement=local")
    prepared = prepare_evaluation(found, changed, recipe=recipe, site=site, here=here)
    if dry_run:
        from hpc_rl.cli.submit import show_dry_run

        show_dry_run(prepared, f"evaluation of {target}", as_json)
        return
    run = start_evaluation(prepared, found, here=here, as_json=as_json, quiet=as_json and follow)
    if follow:
        raise typer.Exit(follow_evaluation(run, as_json))


def prepare_evaluation(
    target: Target, overrides: list[str], *, recipe: str | None, site: str | None, here: bool
) -> Prepared:
    """The evaluation worked out; nothing is written. Raises UserError, RunError or RecipeError."""
    from hpc_rl.cli._evaluated import evaluation_overrides, resolved
    from hpc_rl.cli._prepare import prepare
    from hpc_rl.cli.errors import UserError
    from hpc_rl.plan.make import read_plan
    from hpc_rl.plan.site import Site
    from hpc_rl.recipe.load import load_recipe

    if target.run is not None and recipe is not None:
        raise UserError(f"--recipe is for models of no run; {target.run.root} has its own")
    profile: Site | None = None
    path: str | Path
    if target.run is not None:
        path, base = target.run.resolved, resolved(target.run)
        if site is None and not any(word.startswith("cluster.site=") for word in overrides):
            profile = Site.model_validate(read_plan(target.run.plan).site_profile)  # as it was at submission
    elif recipe is not None:
        path, base = recipe, load_recipe(recipe).recipe
    else:
        raise UserError(
            f"{target.model} belongs to no run: name the recipe with data.eval and rewards (--recipe RECIPE)"
        )
    words = evaluation_overrides(target, base, overrides)
    return prepare(path, words, site=site, profile=profile, here=here)


def start_evaluation(prepared: Prepared, target: Target, *, here: bool, as_json: bool, quiet: bool) -> RunDir:
    """Check, make the evaluation's run directory, start it, and (unless `quiet`) say where."""
    from hpc_rl.cli._checks import require_checks
    from hpc_rl.cli._console import note
    from hpc_rl.cli._prepare import create_run, discard
    from hpc_rl.cli._start import check_allocation, start
    from hpc_rl.cli.resume import use_stored_secrets
    from hpc_rl.cli.submit import tell
    from hpc_rl.run.index import remember

    if here:
        check_allocation(prepared)
    if target.run is not None:
        use_stored_secrets(target.run, prepared.recipe.cluster.secrets)
    require_checks(prepared, here=here)
    run, missing = create_run(prepared)
    try:
        started = start(run, prepared, here=here)
    except BaseException:
        discard(run)  # nothing was started: nothing is left
        raise
    if quiet:
        remember(run)
        note(f"run dir: {run.root}")
    else:
        tell(run, started, missing, as_json)
    return run


def follow_evaluation(run: RunDir, as_json: bool) -> int:
    """Wait for the end, print the result; the exit code."""
    from dataclasses import asdict

    from hpc_rl.cli._console import note, print_json, table
    from hpc_rl.cli._follow import exit_code, watch
    from hpc_rl.cli._state import ENDED
    from hpc_rl.run.evaluations import answers_file, read_evaluated

    try:
        status = watch(run, lambda status: status.state in ENDED)
    except KeyboardInterrupt:
        note(f"detached; the evaluation goes on: {run.root}")
        return 0
    found = read_evaluated(run)
    if as_json:
        result = {} if found is None else asdict(found)
        print_json({"run_dir": str(run.root), "state": status.state, "cause": status.first_cause, **result})
    elif found is not None:
        print(table(["metric", "value"], [[name, f"{value:.6g}"] for name, value in found.metrics.items()]))
        if answers_file(run).is_file():
            print(f"answers: {answers_file(run)}")
    if status.state != "COMPLETED" and not as_json:
        print(f"{status.state}: {run.root}\nfirst cause: {status.first_cause}\nlogs: {status.logs}")
    return exit_code(run, status)


def print_list(run: RunDir, as_json: bool) -> None:
    """The evaluations of `run` that have ended, one line each."""
    from dataclasses import asdict

    from hpc_rl.cli._console import ago, note, print_json, table
    from hpc_rl.run.evaluations import evaluated_below

    found = evaluated_below(run)
    if as_json:
        print_json([{"run_dir": str(folder.root), **asdict(result)} for folder, result in found])
        return
    if not found:
        note(f"{run.root} has no evaluation that has ended; start one: hpc-rl eval {run.root}")
        return
    shown = ["eval/accuracy", "eval/reward_mean", "eval/pass@1", "eval/loss"]
    shown = [name for name in shown if any(name in result.metrics for _, result in found)]
    rows = [
        [result.name, *(f"{result.metrics[name]:.4g}" if name in result.metrics else "-" for name in shown),
         result.data, ago(result.time), folder.root]
        for folder, result in found
    ]  # fmt: skip
    print(table(["what", *(name.removeprefix("eval/") for name in shown), "data", "ended", "folder"], rows))
