"""Where a trainer starts from: the newest good checkpoint, of any number of ranks, or an error."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hpc_rl.bus.server import RedisServer
from hpc_rl.checkpoint.loader import CheckpointError
from hpc_rl.plan.schema import Mesh
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.events import read_events
from hpc_rl.run.paths import RunDir
from tests.policy.sft_runs import SGD, save, train
from tests.ranks import run_ranks
from tests.training import make_context, make_plan, make_recipe, make_run

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def saved_run(folder: Path, recipe: Recipe, steps: tuple[int, ...]) -> RunDir:
    """A run with checkpoints of `steps` (of one process)."""
    run = make_run(folder, recipe, make_plan(recipe))
    trainer = Fsdp2Trainer(make_context(run, recipe))
    assert trainer.load() == 0
    done = 0
    for step in steps:
        train(trainer, done + 1, step)
        save(trainer, run, step)
        done = step
    trainer.close()
    return run


def load(run: RunDir, recipe: Recipe, attempt: int) -> int:
    trainer = Fsdp2Trainer(make_context(run, recipe, attempt=attempt))
    try:
        return trainer.load()
    finally:
        trainer.close()


def flip(folder: Path) -> None:
    """Change what tells where the tensors lie, in place and without changing its size."""
    for name in (".pieces.json", ".metadata"):
        if (path := folder / "policy" / name).exists():
            data = bytearray(path.read_bytes())
            data[10:40] = bytes(30)
            path.write_bytes(data)


def test_damaged_checkpoints_are_passed_over_with_a_word_and_never_come_back(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(tmp_path, tiny_model)
    run = saved_run(tmp_path, recipe, (2, 4, 6))
    cut = run.checkpoint(6) / "policy" / "__0_0.distcp"
    whole = cut.read_bytes()
    cut.write_bytes(whole[:1000])  # seen by its size
    flip(run.checkpoint(4))  # seen when it does not load
    with caplog.at_level(logging.WARNING):
        assert load(run, recipe, 2) == 2
    assert f"policy/__0_0.distcp has 1000 bytes, {len(whole)} were written" in caplog.text
    bad = [(e["checkpoint"], e["reason"]) for e in read_events(run) if e["kind"] == "checkpoint_bad"]
    assert [name for name, _ in bad] == ["step_00000006", "step_00000004"]
    assert re.search(r"the contents of policy/\.(pieces\.json|metadata) changed", bad[1][1])
    cut.write_bytes(whole)  # the file is back; its steps were rolled back all the same
    assert load(run, recipe, 3) == 2
    assert json.loads((run.checkpoint(6) / "BAD").read_text())["reason"] == bad[0][1]
    assert run.complete_steps() == [2]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_in_silence(
    tiny_model: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path, tiny_model)
    run = saved_run(tmp_path, recipe, (2,))
    (run.checkpoint(2) / "policy" / "__0_0.distcp").unlink()
    for attempt in (2, 3):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
            load(run, recipe, attempt)


def test_a_sound_checkpoint_that_does_not_fit_is_an_error_and_stays(tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, tiny_model, optimizer=SGD)
    run = saved_run(tmp_path, recipe, (1, 2))
    with pytest.raises(CheckpointError, match="lacks"):  # AdamW has moments that SGD never had
        load(run, make_recipe(tmp_path, tiny_model), 2)
    assert run.complete_steps() == [1, 2]
    assert load(run, recipe, 3) == 2


def sharded_run(
    rank: int,
    world_size: int,
    root: str,
    recipe_json: str,
    bus_file: str,
    attempt: int,
    tp: int,
    first: int,
    last: int,
) -> None:
    recipe = Recipe.model_validate_json(recipe_json)
    run = RunDir(Path(root))
    context = make_context(
        run, recipe, rank=rank, world_size=world_size, bus_file=Path(bus_file), attempt=attempt
    )
    mesh = Mesh(dp_shard=world_size // tp, tp=tp)
    trainer = Fsdp2Trainer(replace(context, plan=context.plan.model_copy(update={"mesh": mesh})))
    assert trainer.load() == first
    draws = [torch.zeros(4) for _ in range(world_size)]
    dist.all_gather(draws, torch.rand(4))
    losses = train(trainer, first + 1, last)
    save(trainer, run, last)
    if rank == 0:
        record = {"losses": losses, "draws": [draw.tolist() for draw in draws]}
        (run.root / f"record_{attempt}.json").write_text(json.dumps(record))
    dist.barrier()
    trainer.close()


def go_on(
    run: RunDir,
    recipe: Recipe,
    redis: RedisServer,
    attempt: int,
    ranks: int,
    steps: tuple[int, int],
    tp: int = 1,
) -> dict:
    """Train from one step to another on `ranks` ranks, and save; the losses and a random draw per rank.

    The ranks meet in a Redis that tests share, under a number of an attempt that must be their own.
    """
    bus_file = run.bus_file(attempt)
    redis.write_bus_file(bus_file)
    arguments = (str(run.root), recipe.model_dump_json(), str(bus_file), attempt, tp, *steps)
    run_ranks(sharded_run, ranks, run.root / "logs", *arguments, group=False)
    record: dict = json.loads((run.root / f"record_{attempt}.json").read_text())
    return record


@pytest.mark.redis
def test_two_ranks_then_one_then_four_train_as_one(
    tiny_model: Path, tmp_path: Path, redis_server: RedisServer
) -> None:
    """AdamW, a linear schedule and the order of the data included: the losses are those of one process."""
    recipe = make_recipe(tmp_path, tiny_model, steps=8)
    alone = saved_run(tmp_path / "alone", recipe, (2, 4, 6))
    trainer = Fsdp2Trainer(make_context(alone, recipe, attempt=9))
    assert trainer.load() == 6
    expected = train(trainer, 7, 8)
    trainer.close()

    run = make_run(tmp_path / "many", recipe, make_plan(recipe))
    go_on(run, recipe, redis_server, 81, 2, (0, 3))
    go_on(run, recipe, redis_server, 82, 1, (3, 6))
    twin = RunDir(shutil.copytree(run.root, tmp_path / "twin"))
    record = go_on(run, recipe, redis_server, 83, 4, (6, 8))
    assert max(abs(a - b) for a, b in zip(record["losses"], expected, strict=True)) <= 1e-5
    # Ranks that the saving run did not have are seeded apart from all others, and always the same way.
    assert len({tuple(draw) for draw in record["draws"]}) == 4
    assert go_on(twin, recipe, redis_server, 84, 4, (6, 8)) == record


@pytest.mark.redis
@pytest.mark.slow
def test_fsdp_then_tensor_parallel_then_both_then_fsdp(
    tiny_model: Path, tmp_path: Path, redis_server: RedisServer
) -> None:
    recipe = make_recipe(tmp_path, tiny_model, steps=8)
    alone = make_run(tmp_path / "alone", recipe, make_plan(recipe))
    trainer = Fsdp2Trainer(make_context(alone, recipe))
    trainer.load()
    expected = train(trainer, 1, 8)
    trainer.close()
    run = make_run(tmp_path / "many", recipe, make_plan(recipe))
    losses: list[float] = []
    plans = ((2, 1, (0, 2)), (2, 2, (2, 4)), (4, 2, (4, 6)), (2, 1, (6, 8)))
    for attempt, (ranks, tp, steps) in enumerate(plans, 91):
        losses += go_on(run, recipe, redis_server, attempt, ranks, steps, tp)["losses"]
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) <= 1e-5
