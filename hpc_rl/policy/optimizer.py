"""Optimizer, learning-rate schedule and gradient norm. All a function of the recipe and the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_rl.recipe.schema import Optimizer


def make_optimizer(module: nn.Module, options: Optimizer) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters. Vectors (norms, biases) get no weight decay."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.name == "sgd":
        return torch.optim.SGD(groups, lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


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


def learning_rate(options: Optimizer, step: int, total_steps: int) -> float:
    """The rate of step `step` (1-based): linear warm-up, then constant, or down to (almost) 0."""
    if step <= options.warmup_steps:
        return options.lr * step / (options.warmup_steps + 1)
    if options.schedule == "constant":
        return options.lr
    progress = (step - 1 - options.warmup_steps) / max(1, total_steps - options.warmup_steps)
    progress = min(1.0, progress)
    if options.schedule == "linear":
        return options.lr * (1 - progress)
    return options.lr * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """Scale the gradients to a total norm of `clip_norm` at most; the norm before, over all ranks."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # a collective
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm
