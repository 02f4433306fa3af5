"""What a checkpoint of the policy holds, as flat names: model, optimizer, step, every rank's RNG.

    model.<parameter or buffer>    optim.<parameter>.<exp_avg | exp_avg_sq | step>
    step    rng_<rank>    rng_cuda_<rank>

Tensors only; learning rates and the like come from the recipe and the step.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from hpc_rl.checkpoint.loader import load_into, tensors_of
from hpc_rl.policy.optimizer import create_state


def training_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int
) -> dict[str, Tensor]:
    """References to the live tensors (RNG states and the step are copies)."""
    saved = set(module.state_dict())
    named = dict(module.named_parameters())  # ties once
    state: dict[str, Tensor] = {f"model.{name}": p for name, p in named.items()}
    state |= {f"model.{name}": b for name, b in module.named_buffers() if name in saved}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                state[f"optim.{name}.{key}"] = value
    state["step"] = torch.tensor(step)
    state[f"rng_{rank}"] = torch.get_rng_state()
    if torch.cuda.is_available():
        state[f"rng_cuda_{rank}"] = torch.cuda.get_rng_state()
    return state


def restore(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> int:
    """Fill module, optimizer and RNG from `folder` (saved by any number of ranks); the step.

    A rank that the saving run did not have keeps its fresh RNG. Raises CheckpointError.
    """
    create_state(optimizer)
    state = training_state(module, optimizer, 0, rank)
    optional = frozenset(name for name in state if name.startswith("rng_"))
    optional |= _without_state(module, optimizer, folder)
    loaded = load_into(folder, state, optional=optional)
    if f"rng_{rank}" in loaded:
        torch.set_rng_state(state[f"rng_{rank}"])
    if f"rng_cuda_{rank}" in loaded:
        torch.cuda.set_rng_state(state[f"rng_cuda_{rank}"])
    return int(state["step"].item())


def _without_state(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> frozenset[str]:
    """Forget the fresh optimizer state of parameters that have none in `folder`; its names.

    The optimizer makes state at a parameter's first gradient. Some never get one: a vision tower that
    trains on text alone, an expert that no token went to.
    """
    saved = {name.rpartition(".")[0] for name in tensors_of(folder) if name.startswith("optim.")}
    forgotten: set[str] = set()
    if not saved:
        return frozenset()  # no state at all is no accident of the data: the load below says what lacks
    for name, parameter in module.named_parameters():
        if f"optim.{name}" not in saved:
            forgotten |= {f"optim.{name}.{key}" for key in optimizer.state.pop(parameter, {})}
    return frozenset(forgotten)
