"""SFT with images: rows are read by the rank that trains them, and the training is that of one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hpc_rl.bus.messages import TrainStep
from hpc_rl.bus.server import RedisServer
from hpc_rl.checkpoint.layout import write_complete
from hpc_rl.data.errors import DataError
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from tests.ranks import run_ranks
from tests.tiny_vlms import picture, save_vlm
from tests.training import make_context, make_plan, make_run

pytestmark = [pytest.mark.torch, pytest.mark.redis]
torch.set_num_threads(1)
SGD = {"name": "sgd", "lr": 0.3, "clip_norm": 1.0, "weight_decay": 0.0}


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Not the session's: two process groups of one name would meet in it."""
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


def make_recipe(folder: Path, family: str = "llava", **policy: object) -> Recipe:
    """Twelve rows: some with one image, some with two, some (whole steps of a rank) with none."""
    model = save_vlm(folder / "model", family)
    rows = []
    for k in range(12):
        # In mllama, what stands before the first image sees the padding of rows with fewer images.
        count = 0 if k in (0, 1, 2, 3, 6) else 1 if k % 2 or family == "mllama" else 2
        images = [f"{k}.png"] * count
        picture(k, 28, 28 + 7 * (k % 3)).save(folder / f"{k}.png")
        question = "<image>" * len(images) + f"n {k}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"answer {k}"}]
        rows.append({"image": images or None, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    train = {"path": str(folder / "rows.json"), "format": "llava", "shuffle": False}
    options = {"batch_size": 4, "micro_batch_tokens": 96, "steps": 4, "optimizer": SGD, **policy}
    return Recipe.model_validate({
        "name": "tiny-vlm", "kind": "sft", "seed": 3, "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": train, "eval": {**train, "limit": 5}}, "policy": options,
    })  # fmt: skip


def run_steps(trainer: Fsdp2Trainer, first: int, last: int) -> list[float]:
    return [trainer.train_step(TrainStep(step))["train/loss"] for step in range(first, last + 1)]


def one_process(folder: Path, recipe: Recipe) -> tuple[list[float], float]:
    trainer = Fsdp2Trainer(make_context(make_run(folder, recipe, make_plan(recipe)), recipe))
    assert trainer.load() == 0
    losses = run_steps(trainer, 1, 4)
    evaluated = trainer.evaluate(4)["eval/loss"]
    trainer.close()
    return losses, evaluated


def sharded(rank: int, world_size: int, root: str, recipe_json: str, bus_file: str, out: str) -> None:
    recipe = Recipe.model_validate_json(recipe_json)
    run = RunDir(Path(root))
    trainer = Fsdp2Trainer(
        make_context(run, recipe, rank=rank, world_size=world_size, bus_file=Path(bus_file))
    )
    assert trainer.load() == 0
    losses = run_steps(trainer, 1, 2)
    trainer.stage_checkpoint(2, run.checkpoint(2) / "policy", sync=True)
    results = list(trainer.poll())
    losses += run_steps(trainer, 3, 4)
    evaluated = trainer.evaluate(4)["eval/loss"]
    if rank == 0:
        assert [r.error for r in results] == [""]
        write_complete(run.checkpoint(2))
        torch.save({"losses": losses, "eval": evaluated}, out)
    dist.barrier()
    trainer.close()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama"])
def test_two_ranks_train_on_images_as_one_process_does(
    family: str, tmp_path: Path, own_redis: RedisServer
) -> None:
    recipe = make_recipe(tmp_path, family)
    losses, evaluated = one_process(tmp_path / "one", recipe)
    run = make_run(tmp_path / "two", recipe, make_plan(recipe, 2))
    bus_file = run.bus_file(1)
    own_redis.write_bus_file(bus_file)
    out = tmp_path / "two.pt"
    arguments = (str(run.root), recipe.model_dump_json(), str(bus_file), str(out))
    run_ranks(sharded, 2, tmp_path, *arguments, group=False)
    two = torch.load(out)
    assert max(abs(a - b) for a, b in zip(losses, two["losses"], strict=True)) <= 1e-5
    assert abs(evaluated - two["eval"]) <= 1e-5
    # The two ranks' checkpoint goes on in one process.
    trainer = Fsdp2Trainer(make_context(run, recipe, attempt=2))
    assert trainer.load() == 2
    rest = run_steps(trainer, 3, 4)
    trainer.close()
    assert max(abs(a - b) for a, b in zip(losses[2:], rest, strict=True)) <= 1e-5


def test_a_damaged_picture_names_its_row_at_its_step(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    (tmp_path / "9.png").write_bytes(b"no picture")
    trainer = Fsdp2Trainer(make_context(make_run(tmp_path / "run", recipe, make_plan(recipe)), recipe))
    trainer.load()
    run_steps(trainer, 1, 2)
    with pytest.raises(DataError, match=r"rows\.json: row 9: image .*9\.png cannot be read"):
        run_steps(trainer, 3, 3)
    trainer.close()
