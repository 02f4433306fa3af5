"""SFT with images: rows are read by the rank that trains them, and the training is that of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hpc_rl.bus.server import RedisServer
from hpc_rl.data.errors import DataError
from hpc_rl.recipe.schema import Recipe
from tests.policy.sft_runs import SGD, apart, fresh, one_process, sharded, start, train
from tests.tiny_vlms import picture, save_vlm

pytestmark = [pytest.mark.torch, pytest.mark.redis]
torch.set_num_threads(1)


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


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama"])
def test_two_ranks_train_on_images_as_one_process_does(
    family: str, tmp_path: Path, redis_server: RedisServer
) -> None:
    recipe = make_recipe(tmp_path, family)
    one = one_process(tmp_path / "one", recipe)
    run, two = sharded(tmp_path / "two", recipe, redis_server, last=4, cut=2)
    assert apart(one["losses"], two["losses"]) <= 1e-5
    assert apart(one["evals"], two["evals"]) <= 1e-5
    # The two ranks' checkpoint goes on in one process.
    trainer = start(run, recipe, attempt=2, step=2)
    rest = train(trainer, 3, 4)
    trainer.close()
    assert apart(one["losses"][2:], rest) <= 1e-5


def test_a_damaged_picture_names_its_row_at_its_step(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    (tmp_path / "9.png").write_bytes(b"no picture")
    _, trainer = fresh(tmp_path / "run", recipe)
    train(trainer, 1, 2)
    with pytest.raises(DataError, match=r"rows\.json: row 9: image .*9\.png cannot be read"):
        train(trainer, 3, 3)
    trainer.close()
