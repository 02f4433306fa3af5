"""Learning-rate schedules and gradient clipping."""

from __future__ import annotations

import pytest
import torch

from hpc_rl.policy.optimizer import clip_gradients, create_state, learning_rate, make_optimizer
from hpc_rl.recipe.schema import Optimizer

pytestmark = pytest.mark.torch


def test_schedules() -> None:
    rates = {
        name: [learning_rate(Optimizer(lr=1.0, schedule=name, warmup_steps=3), s, 11) for s in range(1, 12)]
        for name in ("constant", "linear", "cosine")
    }
    for values in rates.values():
        assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates["constant"][-1] == 1.0
    assert rates["linear"][3:] == pytest.approx([1 - i / 8 for i in range(8)])
    assert all(
        a > b > 0
        for name in ("linear", "cosine")
        for a, b in zip(rates[name][3:], rates[name][4:], strict=False)
    )


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
def test_clip_gradients(clip: float | None) -> None:
    parameters = [
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((2,), -2.0)
    norm = clip_gradients(parameters, clip)
    assert float(norm) == pytest.approx(20**0.5)
    after = torch.cat([parameters[0].grad, parameters[1].grad]).norm()
    assert float(after) == pytest.approx(0.5 if clip == 0.5 else 20**0.5, rel=1e-5)


def test_created_state_is_what_the_first_step_makes() -> None:
    def run(create: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 3)
        optimizer = make_optimizer(module, Optimizer(lr=0.1, weight_decay=0.5))
        if create:
            create_state(optimizer)
        for _ in range(3):
            module(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in module.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))
    decay = {
        len(g["params"][0].shape): g["weight_decay"]
        for g in make_optimizer(torch.nn.Linear(4, 3), Optimizer()).param_groups
    }
    assert decay == {2: 0.01, 1: 0.0}
