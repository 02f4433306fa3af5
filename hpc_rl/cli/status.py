"""`hpc-rl status`: what a run does, how far it is, and the first cause if it failed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from hpc_rl.cli._state import RunStatus


def status(
    run: str = typer.Argument(..., help="Run directory, recipe name (its latest run) or Slurm job id."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """Show what a run does: state, step, attempt, each role, and the first cause of a failure.

    It works from the run directory alone: without Slurm, and for jobs that Slurm has forgotten.

    \b
    Example:
      hpc-rl status gsm8k-grpo
      hpc-rl status 123456 --json
    """
    from hpc_rl.cli._console import print_json
    from hpc_rl.cli._state import run_status
    from hpc_rl.run.index import find_run

    answer = run_status(find_run(run))
    if as_json:
        print_json(answer.as_json())
    else:
        typer.echo(describe(answer))


def describe(answer: RunStatus) -> str:
    """The status as text."""
    from hpc_rl.cli._console import ago, table
    from hpc_rl.run.best import Best
    from hpc_rl.telemetry.console import number, step_name

    facts: list[tuple[str, object]] = [("run", answer.run), ("run dir", answer.run_dir)]
    facts.append(("job", f"{answer.job_id or '-'} ({answer.placement or 'not submitted'})"))
    facts.append(("state", answer.state + (f" ({answer.reason})" if answer.reason else "")))
    facts.append(("step", step_name(answer.step or 0, answer.total_steps) + progress(answer)))
    facts.append(("attempt", answer.attempt))
    if answer.checkpoint is not None:
        facts.append(("checkpoint", f"step {answer.checkpoint}"))
    if answer.best is not None:
        facts.append(("best", Best(**answer.best)))
    if answer.checkpoint_problem:
        facts.append(("WARNING", answer.checkpoint_problem))
    if answer.export_problem:
        facts.append(("WARNING", answer.export_problem))
    shown_uploads = [line for line in answer.uploads if line.error] or answer.uploads[-2:]
    facts += [("WARNING" if line.error else "upload", line.words()) for line in shown_uploads[-4:]]
    if any(line.error for line in answer.uploads):
        facts.append(("by hand", f"hpc-rl upload {answer.run_dir}"))
    if answer.first_cause:
        facts.append(("first cause", answer.first_cause))
    if answer.redis_restarts:
        facts.append(("Redis", f"restarts in this attempt: {answer.redis_restarts}"))
    if answer.wandb:
        facts.append(("W&B", answer.wandb))
    facts.append(("logs", answer.logs))
    shown = ("train/loss", "eval/loss", "rollout/reward_mean", "eval/accuracy", "rollout/staleness_mean",
             "train/tokens_per_s", "train/mfu", "time/step_s")  # fmt: skip
    values = [f"{name} {number(answer.metrics[name], 4)}" for name in shown if name in answer.metrics]
    if values:
        facts.append(("metrics", ", ".join(values)))
    lines = [f"{name + ':':13}{value}" for name, value in facts]
    if answer.components:
        rows = [[c["id"], c["name"], c["state"], c["nodes"] or c["reason"] or "-"] for c in answer.components]
        lines += ["", table(["component", "name", "state", "nodes"], rows)]
    if answer.roles:
        rows = [[f"{r.role} {r.index}", r.state, ago(r.since), r.words()] for r in answer.roles]
        lines += ["", table(["role", "phase", "for", ""], rows)]
    return "\n".join(lines)


def progress(answer: RunStatus) -> str:
    """` (40 %, 12m left)`, as far as it is known."""
    from hpc_rl.telemetry.console import duration

    if not answer.total_steps or answer.state != "RUNNING":
        return ""
    share = f"{100 * (answer.step or 0) / answer.total_steps:.0f} %"
    return f" ({share}, {duration(answer.eta_s)} left)" if answer.eta_s is not None else f" ({share})"
