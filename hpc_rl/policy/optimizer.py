"""Optimizer, parameter groups, schedule and gradient norm: functions of the recipe and the step."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hpc_rl.recipe.schema import Optimizer

LOG = logging.getLogger("hpc_rl.policy")


class OptimizerError(ValueError):
    """The recipe's optimizer does not fit the model; the message names the key."""


@dataclass
class _Group:
    """Parameters with the same rate and decay. `label` is the pattern they matched."""

    label: str
    lr: float
    weight_decay: float
    parameters: list[nn.Parameter] = field(default_factory=list)


def make_optimizer(module: nn.Module, options: Optimizer) -> torch.optim.Optimizer:
    """AdamW or SGD over the parameters that are trained; frozen ones are left out.

    A parameter is of the first of `options.groups` whose pattern is found in its name. Vectors (norms,
    biases) get no weight decay unless their group names one. Raises OptimizerError for a pattern that
    matches nothing and for a model without any trained parameter.
    """
    found = _grouped(module, options)
    groups = [
        {"params": group.parameters, "weight_decay": group.weight_decay, "lr": group.lr, "base_lr": group.lr}
        for group in found
    ]
    if len(found) > 2 or options.groups:
        for group in found:
            count = sum(p.numel() for p in group.parameters)
            LOG.info(
                "optimizer group %-30s lr %-8g weight_decay %-6g %4d tensors %12s parameters",
                group.label, group.lr, group.weight_decay, len(group.parameters), f"{count:,}",
            )  # fmt: skip
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def _grouped(module: nn.Module, options: Optimizer) -> list[_Group]:
    """The groups that have parameters, those of the recipe's patterns first."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise OptimizerError("no parameter is trained; see model.train and model.freeze")
    groups: dict[tuple[int, float], _Group] = {}
    patterns = [re.compile(group.match) for group in options.groups]
    matched = [0] * len(patterns)
    for name, parameter in named:
        hits = [index for index, pattern in enumerate(patterns) if pattern.search(name)]
        for index in hits:
            matched[index] += 1
        at = hits[0] if hits else len(patterns)
        lr, decay, label = options.lr, options.weight_decay if parameter.dim() >= 2 else 0.0, "(others)"
        if hits:
            own = options.groups[at]
            label = own.match
            lr = options.lr if own.lr is None else own.lr
            decay = decay if own.weight_decay is None else own.weight_decay
        groups.setdefault((at, decay), _Group(label, lr, decay)).parameters.append(parameter)
    used = {at for at, _ in groups}
    for index, group in enumerate(options.groups):
        if matched[index] == 0:
            frozen = any(patterns[index].search(name) for name, p in module.named_parameters())
            what = "only frozen parameters" if frozen else f"no parameter (the first is {named[0][0]!r})"
            raise OptimizerError(f"policy.optimizer.groups[{index}].match {group.match!r} matches {what}")
        if index not in used:
            raise OptimizerError(
                f"policy.optimizer.groups[{index}].match {group.match!r}: earlier groups match all of its "
                f"{matched[index]} parameters; move it before them"
            )
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1]))]


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the first `step` would make, so that a checkpoint has where to be read into."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's rate is its own, times the schedule's factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def learning_rate(options: Optimizer, step: int, total_steps: int) -> float:
    """The rate of step `step` (1-based) where no group has one of its own."""
    return options.lr * schedule_factor(options, step, total_steps)


def schedule_factor(options: Optimizer, step: int, total_steps: int) -> float:
    """What the rate of step `step` (1-based) is multiplied with: linear warm-up, then the schedule.

    Falling schedules end at `min_lr / lr`, or just above it: the last step still trains. `wsd`
    (warm-up, stable, decay) is that of MiniCPM, arXiv 2404.06395, with a linear decay.
    """
    warmup = warmup_steps(options, total_steps)
    if step <= warmup:
        return step / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    floor = options.min_lr / options.lr if options.lr > 0 else 0.0
    if options.schedule == "wsd":
        decay = decay_steps(options, total_steps)
        into = max(0, step - (total_steps - decay))
        left = 1.0 - min(into, decay) / (decay + 1)
    else:
        progress = min(1.0, (step - 1 - warmup) / max(1, total_steps - warmup))
        left = 1 - progress if options.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (1 - floor) * left


def warmup_steps(options: Optimizer, total_steps: int) -> int:
    """`warmup_steps`, or `warmup_ratio` of all steps."""
    if options.warmup_ratio is None:
        return options.warmup_steps
    return round(options.warmup_ratio * total_steps)


def decay_steps(options: Optimizer, total_steps: int) -> int:
    """Steps of the wsd schedule's decay: `decay_steps`, or the last tenth of all."""
    return options.decay_steps or max(1, total_steps // 10)


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """Scale the gradients to a total norm of `clip_norm` at most; the norm before, over all ranks.

    Each element counts once: parts on other ranks are added, copies (of replicas, and of what tensor
    parallelism does not split) are not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = _total_norm(gradients)
    if clip_norm is not None:
        locals_ = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(locals_, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, which may lie on several meshes. A collective where they are sharded."""
    by_home: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        if isinstance(gradient, DTensor):
            split = tuple(i for i, p in enumerate(gradient.placements) if not p.is_replicate())
            by_home.setdefault((gradient.device_mesh, split), []).append(gradient.to_local())
        else:
            by_home.setdefault((None, ()), []).append(gradient)
    norms = []
    for (mesh, split), parts in by_home.items():
        norm = torch.nn.utils.get_total_norm(parts)
        if mesh is not None and split:
            square = norm.square()
            for dimension in split:
                dist.all_reduce(square, group=mesh.get_group(dimension))
            norm = square.sqrt()
        norms.append(norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
