"""Whatever the order of messages of policy and replicas, and whoever dies: the run ends, and is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc_rl.bus import messages as m
from hpc_rl.recipe.schema import Lora
from hpc_rl.run.best import Best, read_best
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
        assert rows[-1]["weights/bytes"] == 1.0, "of the newest push"


@pytest.mark.parametrize("deaths", [0, 2])
def test_the_best_of_the_evaluated_checkpoints_is_kept_whenever_its_score_comes(
    tmp_path: Path, deaths: int
) -> None:
    skills = {2: 0.3, 4: 0.4, 6: 0.9, 8: 0.5}
    kept = []
    for seed in range(SEEDS):
        checkpoint = {"save_every": 2, "max_keep": 1}
        folder = tmp_path / str(seed)
        controller = make_controller(folder, steps=STEPS, replicas=2, before=True, checkpoint=checkpoint)
        simulation = Simulation(controller, seed, deaths=deaths, ack=0.9)
        simulation.skill = lambda version: skills.get(version, 1.0)
        assert simulation.run()
        rows = [json.loads(line) for line in controller.run_dir.metrics.read_text().splitlines()]
        scores = {row["step"]: row["eval/accuracy"] for row in rows if row["step"] and "eval/accuracy" in row}
        best = max(scores, key=lambda step: scores[step])
        assert read_best(controller.run_dir) == Best(best, "eval/accuracy", skills[best])
        assert controller.run_dir.complete_steps() == sorted({best, STEPS})
        kept.append(best)
    assert 6 in kept, "an evaluation may be given up or fall out, but not in every order"


class Watching(Simulation):
    """Notes what replicas are asked for training, and in which state of the policy."""

    def run(self) -> bool:
        self.asked: list[tuple[int, int, int]] = []
        return super().run()

    def obey(self, index: int, message: object) -> None:
        if isinstance(message, m.Generate) and message.purpose == "train":
            self.asked.append((message.prompt.ordinal, message.sampling.seed, self.version[index]))
        super().obey(index, message)


@pytest.mark.parametrize("staleness", [0, 2])
def test_evaluations_leave_the_training_order_alone(tmp_path: Path, staleness: int) -> None:
    """Prompts and seeds of a run with evaluations are those of one without; synchronously the order and the
    policy version of each prompt, too."""
    asked, trained = [], []
    for name, evaluates in (("with", True), ("without", False)):
        controller = make_controller(
            tmp_path / name,
            steps=STEPS,
            replicas=2,
            before=True,
            algorithm={"max_staleness": staleness},
            evaluation={"samples": 3, "temperature": 0.5},
        )
        if not evaluates:
            controller.recipe.data.eval = None
        simulation = Watching(controller, 3, deaths=0, ack=0.9)
        assert simulation.run()
        assert bool(simulation.evaluated) == evaluates
        seeds = sorted(simulation.asked)
        asked.append(seeds if staleness == 0 else [pair[:2] for pair in seeds])
        trained.append(simulation.trained)
    assert asked[0] == asked[1]
    if staleness == 0:  # else the order is that of the answers
        assert trained[0] == trained[1]


def test_the_best_checkpoint_is_chosen_by_the_metric_and_mode_of_the_recipe(tmp_path: Path) -> None:
    controller = make_controller(
        tmp_path, steps=STEPS, replicas=1, before=False,
        checkpoint={"save_every": 2, "max_keep": 1},
        evaluation={"best": "eval/pass@1", "best_mode": "min", "threshold": 0.5},
    )  # fmt: skip
    simulation = Simulation(controller, 0, deaths=0, ack=0.9)
    simulation.skill = lambda version: {4: 0.1}.get(version, 0.9)
    assert simulation.run()
    assert read_best(controller.run_dir) == Best(4, "eval/pass@1", 0.0)


def test_a_saved_adapter_is_pushed_before_the_first_prompt(tmp_path: Path) -> None:
    """The engines load the bare model, which is not the policy's version 0 then."""

    class Bare(Simulation):
        def obey(self, index: int, message: object) -> None:
            if isinstance(message, m.Generate):
                assert self.version[index] >= 0, "a prompt went to the bare model"
            super().obey(index, message)

    controller = make_controller(tmp_path, steps=2, replicas=2, before=True)
    controller.recipe.model.lora = Lora(adapter="saved")
    simulation = Bare(controller, 0, deaths=0, ack=0.9)
    simulation.version = dict.fromkeys(simulation.replicas, -1)
    assert simulation.run()
    assert simulation.evaluated["step-0"] == {0}
