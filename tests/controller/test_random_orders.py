"""Whatever the order of messages of policy and replicas, and whoever dies: the run ends, and is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.controller.simulation import GROUP_SIZE, PROMPTS_PER_STEP, STALENESS, Simulation, make_controller

STEPS, SEEDS = 8, 12


@pytest.mark.parametrize("deaths", [0, 2])
@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("ack", [0.9, 0.15])
def test_every_order_ends_with_every_prompt_trained_once(
    tmp_path: Path, deaths: int, replicas: int, ack: float
) -> None:
    for seed in range(SEEDS):
        controller = make_controller(
            tmp_path / str(seed), steps=STEPS, replicas=replicas, before=seed % 2 == 0
        )
        simulation = Simulation(controller, seed, deaths=deaths, ack=ack)
        turn = controller.turn if hasattr(controller, "turn") else None
        assert simulation.run(), f"seed {seed} hangs at step {controller.step}, {turn and turn.version}"
        ordinals = [o for o in range(STEPS * PROMPTS_PER_STEP) for _ in range(GROUP_SIZE)]
        assert sorted(simulation.trained) == ordinals
        assert simulation.staleness <= STALENESS
        for tag, versions in simulation.evaluated.items():
            assert versions == {int(tag.removeprefix("step-"))}, "all answers from the evaluated version"
        rows = [json.loads(line) for line in controller.run_dir.metrics.read_text().splitlines()]
        assert [row["step"] for row in rows if row["step"]] == list(range(1, STEPS + 1))
        assert "eval/accuracy" in rows[-1], "the last version is always evaluated"
