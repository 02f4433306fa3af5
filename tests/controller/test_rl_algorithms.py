"""The controller with every algorithm: what its config says is what the steps hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_rl.algorithms.config import RlConfig
from hpc_rl.recipe.extensions import registry
from tests.controller.simulation import GROUP_SIZE, PROMPTS_PER_STEP, Simulation, make_controller

CLASSES = {name: registry("algorithms").config_class(name) for name in registry("algorithms").names()}
RL = sorted(name for name, cls in CLASSES.items() if issubclass(cls, RlConfig) and name != "distill")
MAX_TOKENS = 1024  # rollout.max_tokens of the simulation


@pytest.mark.parametrize("name", RL)
def test_a_run_ends_and_its_steps_are_those_of_the_algorithm(name: str, tmp_path: Path) -> None:
    controller = make_controller(tmp_path, steps=3, replicas=2, before=False, algorithm={"name": name})
    simulation = Simulation(controller, 1, deaths=0, ack=0.9)
    assert simulation.run()
    assert len(simulation.trained) == 3 * PROMPTS_PER_STEP * GROUP_SIZE
    answers, tokens = PROMPTS_PER_STEP * GROUP_SIZE, 2 * PROMPTS_PER_STEP * GROUP_SIZE
    expected = {
        "dr_grpo": answers * MAX_TOKENS, "gspo": answers, "rloo": answers,
    }  # fmt: skip
    assert simulation.denominators == {expected.get(name, tokens)}
    assert controller.packing.overlong_buffer == (MAX_TOKENS // 5 if name == "dapo" else 0)
