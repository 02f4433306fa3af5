"""Learning-rate schedules and gradient clipping."""

from __future__ import annotations

import pytest
import torch

from hpc_rl.policy.optimizer import (
    OptimizerError,
    clip_gradients,
    create_state,
    learning_rate,
    make_optimizer,
    schedule_factor,
    set_rates,
)
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


def test_falling_schedules_end_at_the_floor() -> None:
    for name in ("linear", "cosine"):
        options = Optimizer(lr=1.0, min_lr=0.1, schedule=name)
        rates = [learning_rate(options, step, 1000) for step in range(1, 1001)]
        assert rates[0] == 1.0
        assert 0.1 <= rates[-1] < 0.101
        assert rates == sorted(rates, reverse=True)
    halfway = learning_rate(Optimizer(lr=1.0, min_lr=0.1, schedule="cosine"), 501, 1000)
    assert halfway == pytest.approx(0.55)


def test_wsd_is_constant_and_then_falls_over_the_last_steps() -> None:
    options = Optimizer(lr=1.0, min_lr=0.2, schedule="wsd", warmup_steps=2, decay_steps=3)
    rates = [learning_rate(options, step, 10) for step in range(1, 11)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    tenth = [learning_rate(Optimizer(lr=1.0, schedule="wsd"), step, 50) for step in range(1, 51)]
    assert tenth[44] == 1.0
    assert tenth[45:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_a_warmup_ratio_is_of_all_steps() -> None:
    options = Optimizer(lr=1.0, warmup_ratio=0.1)
    assert [learning_rate(options, step, 40) for step in range(1, 6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1]
    )


class Tower(torch.nn.Module):
    """Names as a VLM has them."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)})
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
        self.norm = torch.nn.LayerNorm(4)


def groups_of(module: torch.nn.Module, **options: object) -> dict[str, tuple[float, float]]:
    """name -> (learning rate, weight decay)"""
    optimizer = make_optimizer(module, Optimizer.model_validate({"lr": 1.0, "weight_decay": 0.5, **options}))
    names = {id(p): name for name, p in module.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in optimizer.param_groups)
    return found


def test_the_first_pattern_that_matches_decides() -> None:
    groups = [
        {"match": r"visual\.proj", "lr": 0.1},
        {"match": "visual|norm", "lr": 0.2, "weight_decay": 0.3},
    ]
    assert groups_of(Tower(), groups=groups) == {
        "visual.proj.weight": (0.1, 0.5),
        "visual.proj.bias": (0.1, 0.0),  # vectors do not decay
        "visual.norm.weight": (0.2, 0.3),  # unless their group says so
        "visual.norm.bias": (0.2, 0.3),
        "layers.0.weight": (1.0, 0.5),
        "layers.0.bias": (1.0, 0.0),
        "layers.1.weight": (1.0, 0.5),
        "layers.1.bias": (1.0, 0.0),
        "norm.weight": (0.2, 0.3),
        "norm.bias": (0.2, 0.3),
    }


def test_the_schedule_scales_every_group() -> None:
    options = Optimizer(lr=1.0, schedule="linear", groups=[{"match": "visual", "lr": 0.1}])
    optimizer = make_optimizer(Tower(), options)
    set_rates(optimizer, schedule_factor(options, 6, 10))
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.05, 0.5])


def test_frozen_parameters_are_left_out_and_patterns_without_effect_are_errors() -> None:
    module = Tower()
    module.visual.requires_grad_(False)
    assert not any(name.startswith("visual") for name in groups_of(module))
    with pytest.raises(OptimizerError, match=r"groups\[0\].match 'visual' matches only frozen parameters"):
        groups_of(module, groups=[{"match": "visual", "lr": 0.1}])
    with pytest.raises(
        OptimizerError, match=r"groups\[0\].match 'vison' matches no parameter \(the first is 'l"
    ):
        groups_of(module, groups=[{"match": "vison", "lr": 0.1}])
    with pytest.raises(OptimizerError, match=r"groups\[1\].match 'norm': earlier groups match all of its 2"):
        groups_of(module, groups=[{"match": "n", "lr": 0.1}, {"match": "norm", "lr": 0.2}])
    module.requires_grad_(False)
    with pytest.raises(OptimizerError, match="no parameter is trained"):
        groups_of(module)


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
