"""A checkpoint brings back just the state that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hpc_rl.checkpoint.loader import CheckpointError
from hpc_rl.checkpoint.saver import Saver
from hpc_rl.policy.ema import WeightAverage
from hpc_rl.policy.guard import SpikeGuard
from hpc_rl.policy.optimizer import make_optimizer
from hpc_rl.policy.state import TrainingState
from hpc_rl.recipe.schema import Ema, Guard, Optimizer

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def make(seed: int) -> tuple[nn.ModuleDict, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
    return module, make_optimizer(module, Optimizer(lr=0.1))


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    return TrainingState(module, optimizer, None, None, 1, 0)


def save(folder: Path, state: TrainingState) -> None:
    saver = Saver(0, 1, "t")
    saver.stage(1, folder, state.tensors())
    assert [result.error for result in saver.wait()] == [""]
    saver.close()


def step(module: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    module["used"](torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_parameters_that_never_had_a_gradient_resume_too(tmp_path: Path) -> None:
    """As a vision tower under training with text alone."""
    module, optimizer = make(0)
    step(module, optimizer)
    save(tmp_path / "c", state_of(module, optimizer))
    again, its_optimizer = make(1)
    assert state_of(again, its_optimizer).restore(tmp_path / "c") == 1
    assert len(its_optimizer.state) == len(optimizer.state) == 2
    step(module, optimizer)
    step(again, its_optimizer)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


def test_a_checkpoint_without_any_optimizer_state_is_refused(tmp_path: Path) -> None:
    module, optimizer = make(0)
    save(tmp_path / "c", state_of(module, optimizer))
    with pytest.raises(CheckpointError, match=r"lacks 12 tensors: optim\."):
        state_of(*make(1)).restore(tmp_path / "c")


def test_optimizer_state_goes_by_name_not_by_group(tmp_path: Path) -> None:
    module, optimizer = make(0)
    for part in ("used", "unused"):
        module[part](torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    save(tmp_path / "c", state_of(module, optimizer))
    again, _ = make(1)
    # "unused" first, and what was two groups is four
    groups = [{"match": "unused", "lr": 0.1}]
    its_optimizer = make_optimizer(again, Optimizer(lr=0.1, groups=groups))
    state_of(again, its_optimizer).restore(tmp_path / "c")
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, its_optimizer.state[again.get_parameter(name)][key]), (name, key)


def test_an_average_and_a_window_that_are_not_in_the_checkpoint_start_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, optimizer = make(0)
    step(module, optimizer)
    save(tmp_path / "c", state_of(module, optimizer))
    again, its_optimizer = make(1)
    average, guard = WeightAverage(again, Ema(decay=0.9)), SpikeGuard(Guard(spike=2.0, window=4))
    guard.judge(1.0)
    TrainingState(again, its_optimizer, average, guard, 0, 0).restore(tmp_path / "c")
    assert all(torch.equal(average.shadow[name], p) for name, p in module.named_parameters())
    assert "has no averaged weights" in caplog.text
    assert "has no losses for policy.guard" in caplog.text
