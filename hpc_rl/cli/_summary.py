"""The plan as a table for people: printed by submit, check and --dry-run."""

from __future__ import annotations

from hpc_rl.cli._console import table
from hpc_rl.plan.schema import Plan


def millions(count: float) -> str:
    """`0.15 M`, `7.6 M`, `7,616 M`."""
    value = count / 1e6
    return f"{value:,.{2 if value < 1 else 1 if value < 100 else 0}f} M"


def plan_summary(plan: Plan) -> str:
    """Groups, steps, time, memory and warnings."""
    header = ["role", "component", "nodes", "tasks", "gpus/task", "cpus/task", "partition", "mem"]
    rows = [
        [
            group.role,
            "-" if group.component is None else group.component,
            group.nodes,
            group.tasks,
            group.gpus_per_task,
            group.cpus_per_task,
            group.partition or "-",
            group.mem or "-",
        ]
        for group in plan.groups
    ]
    hours, minutes = divmod(plan.time_minutes, 60)
    where = f"{plan.kind} on site {plan.site}, placement {plan.placement}"
    head = f"{plan.name}: {where}, time {hours}:{minutes:02d}:00"
    lines = [head + (f", {plan.total_steps} steps" if plan.total_steps else ""), table(header, rows)]
    if plan.memory is not None:
        memory = plan.memory
        room = f" of {memory.gpu_gb:g} GiB" if memory.gpu_gb else ""
        room = " of the node" if memory.on_host else room
        average = f", average {memory.ema_gb:.1f}" if memory.ema_gb else ""
        average += f", reference {memory.reference_gb:.1f}" if memory.reference_gb else ""
        some = (
            f", {millions(memory.trained)} trained" if memory.trained not in (None, memory.parameters) else ""
        )
        parts = f"weights {memory.weights_gb:.1f}, gradients {memory.gradients_gb:.1f}, "
        parts += f"optimizer {memory.optimizer_gb:.1f}{average}"
        lines.append(
            f"policy memory per rank: {memory.total_gb:.1f} GiB{room} ({parts}), before activations; "
            f"{millions(memory.parameters)} parameters{some}"
        )
    lines += plan.notes
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)
