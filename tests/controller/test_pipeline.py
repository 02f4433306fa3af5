"""The asynchronous pipeline as a whole: refill, orders, crashes, again, one replica per prompt group."""

from __future__ import annotations

import heapq
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpc_rl.bus import messages as m
from hpc_rl.controller.members import AttemptFailed
from hpc_rl.controller.prompts import PromptSource
from hpc_rl.controller.state import read_state, write_state
from hpc_rl.controller.window import NO_SIGNAL, Flight, PromptWindow
from hpc_rl.run import jsonl
from tests.controller.simulation import GROUP_SIZE, PROMPTS_PER_STEP, STALENESS, Simulation, make_controller
from tests.controller.test_window import finish, make_group

SEEDS = 8


def ledger(controller: Any) -> tuple[list[int], dict[int, str]]:
    entries = jsonl.read(controller.run_dir.ledger / "prompts.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
    trained = [ordinal for entry in entries for ordinal in entry["trained"]]
    dropped = {int(o): reason for entry in entries for o, reason in entry["dropped"].items()}
    return trained, dropped


def metrics(controller: Any) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in controller.run_dir.metrics.read_text().splitlines()]
    return [row for row in rows if row["step"]]


@pytest.mark.parametrize("staleness", [0, 2])
def test_groups_without_signal_are_replaced_and_the_batch_stays_whole(tmp_path: Path, staleness: int) -> None:
    for seed in range(SEEDS):
        algorithm = {"name": "dapo", "max_staleness": staleness}
        controller = make_controller(
            tmp_path / str(seed), steps=6, replicas=2, before=False, algorithm=algorithm
        )
        simulation = Simulation(controller, seed, deaths=seed % 2, ack=0.9)
        simulation.silent = lambda ordinal: ordinal % 3 == 1
        assert simulation.run(6000)
        trained, dropped = ledger(controller)
        assert len(trained) == 6 * PROMPTS_PER_STEP == len(simulation.trained) // GROUP_SIZE
        assert all(ordinal % 3 != 1 for ordinal in trained)
        assert set(dropped.values()) == {NO_SIGNAL}
        assert sorted([*trained, *dropped]) == list(range(len(trained) + len(dropped))), "each once"
        rows = metrics(controller)
        assert all(row["rollout/groups"] == PROMPTS_PER_STEP for row in rows)
        assert sum(row["rollout/dropped"] for row in rows) == len(dropped)
        assert sum(row["rollout/refilled"] for row in rows) == len(dropped)
        assert simulation.staleness <= staleness


def test_where_nothing_has_signal_steps_go_with_what_they_have(tmp_path: Path) -> None:
    algorithm = {"name": "dapo", "max_refill": 1.5}
    controller = make_controller(tmp_path, steps=4, replicas=2, before=False, algorithm=algorithm)
    simulation = Simulation(controller, 1, deaths=0, ack=0.9)
    simulation.silent = lambda ordinal: ordinal > 3
    assert simulation.run()
    trained, dropped = ledger(controller)
    assert set(trained) == {0, 1, 2, 3}
    rows = metrics(controller)
    assert [row["rollout/groups"] for row in rows].count(0) == 2
    assert rows[-1]["rollout/zero_variance_groups"] == 1.0, "the means are over what was generated"
    assert len(dropped) == sum(row["rollout/dropped"] for row in rows) >= 3 * PROMPTS_PER_STEP
    assert max(row["rollout/refilled"] for row in rows) == 3.0, "1.5 times the two prompts of a step"


@pytest.mark.parametrize("order", ["deadline", "strict"])
def test_the_strict_order_is_that_of_the_data(tmp_path: Path, order: str) -> None:
    orders = []
    for seed in range(SEEDS):
        rollout = {"order": order, "max_in_flight": 1}  # so few that what a step waits for is not all due
        folder = tmp_path / str(seed)
        controller = make_controller(folder, steps=8, replicas=3, before=False, rollout=rollout)
        simulation = Simulation(controller, seed, deaths=seed % 3, ack=0.9)
        assert simulation.run()
        assert simulation.staleness <= STALENESS
        orders.append(ledger(controller)[0])
    whole = list(range(8 * PROMPTS_PER_STEP))
    assert all(sorted(found) == whole for found in orders)
    assert (order == "strict") == all(found == whole for found in orders)


@pytest.mark.parametrize("order", ["deadline", "strict"])
def test_after_any_crash_every_prompt_is_trained_once(tmp_path: Path, order: str) -> None:
    """The controller is lost at any moment; the next one goes on from the newest checkpoint."""
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        sections: dict[str, Any] = {
            "steps": 8, "replicas": 2, "before": False, "checkpoint": {"save_every": 2},
            "algorithm": {"name": "dapo", "max_refill": 1.0}, "rollout": {"order": order},
        }  # fmt: skip
        controller = make_controller(folder, **sections)
        simulation = Simulation(controller, seed, deaths=0, ack=0.9)
        simulation.silent = lambda ordinal: ordinal % 4 == 1
        if simulation.run(random.Random(seed).randrange(40, 400)):
            continue
        newest = controller.run_dir.latest_complete() or 0
        again = make_controller(folder, **sections, attempt=2)
        simulation = Simulation(again, seed, deaths=0, ack=0.9)
        simulation.version = dict.fromkeys(simulation.replicas, newest)
        simulation.silent = lambda ordinal: ordinal % 4 == 1
        assert simulation.run(step=newest)
        trained, dropped = ledger(again)
        assert len(trained) == 8 * PROMPTS_PER_STEP
        assert sorted([*trained, *dropped]) == list(range(len(trained) + len(dropped)))
        assert simulation.staleness <= STALENESS


def test_the_slowest_are_cancelled_and_trained_later(tmp_path: Path) -> None:
    cancelled, again = 0, 0

    class Obeying(Simulation):
        def obey(self, index: int, message: object) -> None:
            nonlocal cancelled
            if isinstance(message, m.CancelGroups):
                answers = self.answers[index]
                for answer in [a for a in answers if isinstance(a, m.GroupDone) and a.tag in message.tags]:
                    cancelled += 1
                    failed = m.GroupFailed(
                        index, 1, "train", answer.tag, answer.group.prompt.ordinal, "cancelled"
                    )
                    answers[answers.index(answer)] = failed
            super().obey(index, message)

    for seed in range(SEEDS):
        controller = make_controller(
            tmp_path / str(seed), steps=8, replicas=3, before=False, rollout={"oversample": 0.5}
        )
        assert Obeying(controller, seed, deaths=0, ack=0.9).run()
        trained, dropped = ledger(controller)
        assert (sorted(trained), dropped) == (list(range(8 * PROMPTS_PER_STEP)), {})
        rows = metrics(controller)
        assert all(row["rollout/groups"] == PROMPTS_PER_STEP for row in rows)
        assert max(row["rollout/staleness_max"] for row in rows) <= STALENESS
        again += sum(row["rollout/cancelled"] for row in rows)
        assert set(controller.generation.dispatch.loads.values()) == {0}, "what is cancelled is answered"
    assert again >= cancelled > 0


def test_a_prompt_group_goes_whole_to_one_replica(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    class Watching(Simulation):
        def obey(self, index: int, message: object) -> None:
            if isinstance(message, m.Generate) and message.purpose == "train":
                asked.append((message.prompt.ordinal, message.group_size))
            super().obey(index, message)

    controller = make_controller(tmp_path, steps=8, replicas=3, before=False)
    assert Watching(controller, 3, deaths=0, ack=0.9).run()
    assert sorted(asked) == [(ordinal, GROUP_SIZE) for ordinal in range(8 * PROMPTS_PER_STEP)]


@pytest.mark.parametrize("slots", [6, 12, 40])
def test_long_groups_are_trained_as_often_as_short_ones_and_in_time(slots: int) -> None:
    """Every fourth prompt takes eight times as long; whatever the engine's width, after n steps as many of
    them are trained as came by then, but for those in flight."""
    size, staleness, steps, step_s = 4, 3, 300, 1.0
    window = PromptWindow(size, staleness, None, total_steps=steps)
    rng = random.Random(slots)
    now, version, busy_until = 0.0, 0, 0.0
    flying: list[tuple[float, int]] = []
    started: dict[int, int] = {}
    trained: list[int] = []
    while not window.over:
        while len(flying) < slots and (ordinal := window.admit(version)) is not None:
            window.hand_out(ordinal, Flight(0, 1, version))
            started[ordinal] = version
            mean = 4.0 if ordinal % 4 == 0 else 0.5
            heapq.heappush(flying, (now + mean * rng.lognormvariate(0, 0.3), ordinal))
        if now >= busy_until and window.ready():
            chosen = window.reserve()
            window.commit()
            ordinals = [group.prompt.ordinal for group in chosen.groups]
            assert all(chosen.step - 1 - started[ordinal] <= staleness for ordinal in ordinals)
            trained += ordinals
            version, busy_until = chosen.step - 1, now + step_s
            long = sum(ordinal % 4 == 0 for ordinal in trained)
            assert abs(long - len(trained) / 4) <= size * (staleness + 1)
            continue
        due = [busy_until] if now < busy_until else []
        now = min([*due, *(flying[:1] and [flying[0][0]])])
        if now >= busy_until:
            version = window.steps_taken
        while flying and flying[0][0] <= now:
            finish(window, heapq.heappop(flying)[1])
    assert sorted(trained) == list(range(steps * size))


class Nothing:
    """Stands where the evaluator and the recorder are."""

    current = None

    def __init__(self) -> None:
        self.done_steps: set[int] = set()
        self.held_rows: dict[int, dict[str, float]] = {}

    def restore(self, rows: dict[int, dict[str, float]]) -> None:
        self.held_rows = rows


def source_of(folder: Path) -> PromptSource:
    from hpc_rl.recipe.schema import DatasetSpec

    (folder / "train.jsonl").write_text('{"prompt": "p", "answer": "a"}\n' * 4)
    return PromptSource(DatasetSpec(path=str(folder / "train.jsonl")), base=folder, seed=0)


def test_state_of_a_version_without_deadlines_is_read(tmp_path: Path) -> None:
    """Step 1 was done and trained ordinals 0 and 1; 3 and 4 had come back, 5 was dropped, 2 in flight."""
    source, nothing = source_of(tmp_path), Nothing()
    old = {
        "step": 1, "prompts_per_step": 2, "fingerprint": source.fingerprint, "dropped": {"5": "bad row"},
        "in_flight": [2], "evaluated": [0], "held_rows": {},
    }  # fmt: skip
    (tmp_path / "state.json").write_text(json.dumps(old))
    kept = msgspec.msgpack.encode([make_group(3), make_group(4)])
    (tmp_path / "buffer.msgpack").write_bytes(kept)
    window = PromptWindow(2, 2, None, total_steps=10)
    everything: tuple[Any, ...] = (1, window, source, nothing, nothing)
    read_state(tmp_path, *everything)
    assert window.admit(1) == 2
    window.hand_out(2, Flight(0, 1, 1))
    finish(window, 2)
    assert window.admit(1) == 6
    first = window.reserve()
    window.commit()
    second = window.reserve()
    assert ([g.prompt.ordinal for g in first.groups], first.drops) == ([3, 4], {})
    assert ([g.prompt.ordinal for g in second.groups], second.drops) == ([2], {5: "bad row"})
    write_state(tmp_path, *everything)
    newer = json.loads((tmp_path / "state.json").read_text()) | {"format": 99}
    (tmp_path / "state.json").write_text(json.dumps(newer))
    with pytest.raises(AttemptFailed, match=r"newer hpc-rl \(format 99"):
        read_state(tmp_path, *everything)


def test_a_large_step_is_packed_beside_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with every step packed in the thread: it ends, and trains the same."""
    monkeypatch.setattr("hpc_rl.controller.packer.AT_ONCE_TOKENS", 0)
    controller = make_controller(tmp_path, steps=8, replicas=2, before=True)
    busy = []

    class Patient(Simulation):
        def policy_acts(self) -> None:
            busy.append(controller.packer.busy)
            assert (controller.poll_s < 0.01) >= controller.packer.busy, "the loop looks again soon"
            super().policy_acts()

    simulation = Patient(controller, 5, deaths=0, ack=0.9)
    assert simulation.run(100_000)
    assert sorted(ledger(controller)[0]) == list(range(8 * PROMPTS_PER_STEP))
    assert any(busy)


def test_a_mistake_while_packing_ends_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpc_rl.controller.packer.AT_ONCE_TOKENS", 0)
    controller = make_controller(tmp_path, steps=8, replicas=2, before=True, algorithm={"name": "maxrl"})
    simulation = Simulation(controller, 5, deaths=0, ack=0.9)
    simulation.score = -1.0
    with pytest.raises(ValueError, match="must not be negative"):
        simulation.run(100_000)
