"""A checkpoint brings back just the state that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from hpc_rl.checkpoint.loader import CheckpointError
from hpc_rl.policy.optimizer import make_optimizer
from hpc_rl.policy.state import TrainingState
from hpc_rl.recipe.schema import Optimizer

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def make(seed: int) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    return module, make_optimizer(module, Optimizer(lr=0.1))


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    return TrainingState(module, optimizer, None, None, 1, 0)


def step(module: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    module["used"](torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_parameters_that_never_had_a_gradient_resume_too(tmp_path: Path) -> None:
    """As a vision tower under training with text alone."""
    module, optimizer = make(0)
    step(module, optimizer)
    dcp.save(
        state_of(module, optimizer).tensors(),
        checkpoint_id=tmp_path / "c",
        no_dist=True,
    )
    again, its_optimizer = make(1)
    assert state_of(again, its_optimizer).restore(tmp_path / "c") == 1
    assert len(its_optimizer.state) == len(optimizer.state) == 2
    step(module, optimizer)
    step(again, its_optimizer)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_a_checkpoint_without_any_optimizer_state_is_refused(tmp_path: Path) -> None:
    module, optimizer = make(0)
    dcp.save(
        state_of(module, optimizer).tensors(),
        checkpoint_id=tmp_path / "c",
        no_dist=True,
    )
    with pytest.raises(CheckpointError, match=r"lacks 12 tensors: optim\."):
        state_of(*make(1)).restore(tmp_path / "c")
