"""RL samples of prompts with images and clips: the learner reads their media, alone and in two ranks."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist

from hpc_rl.bus.messages import TrainStep
from hpc_rl.bus.server import RedisServer
from hpc_rl.controller.batch import BatchOptions, make_samples, train_steps
from hpc_rl.controller.prompts import PromptSource
from hpc_rl.data.errors import DataError
from hpc_rl.plan.schema import Mesh
from hpc_rl.policy.batching import pack_samples
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.recipe.schema import Recipe
from hpc_rl.rollout.engine import EngineSettings, Sample, make_engine
from hpc_rl.rollout.engines.config import HfOptions
from hpc_rl.rollout.media import MediaLoader
from hpc_rl.rollout.prompts import PromptCodec
from hpc_rl.run.paths import RunDir
from hpc_rl.types import Prompt, PromptGroup, TrainSample, Trajectory, VersionSpan
from tests import vision_prompts as v
from tests.policy.sft_runs import SGD, apart, parameters
from tests.ranks import run_ranks
from tests.training import make_context, make_plan, make_run

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.timeout(180)]
torch.set_num_threads(1)
GROUP = 3


def make_recipe(model: Path, rows: Path) -> Recipe:
    return Recipe.model_validate({
        "name": "tiny-vision", "kind": "rl", "seed": 3, "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": v.spec_of(rows).model_dump()},
        "algorithm": {"name": "grpo", "group_size": GROUP, "temperature": v.SAMPLING.temperature},
        "reward": [{"name": "exact"}],
        "policy": {"batch_size": 4 * GROUP, "micro_batch_tokens": 160, "steps": 4, "optimizer": SGD},
        "rollout": {"engine": "hf", "max_tokens": v.SAMPLING.max_tokens, "replicas": 1},
    })  # fmt: skip


def groups_of(recipe: Recipe, run: RunDir) -> list[PromptGroup]:
    """Answers of the hf engine to all rows, as a replica would send them; rewards differ in each group."""
    source = PromptSource(recipe.data.train, base=run.root, seed=0)
    model, spec = recipe.model.path, recipe.data.train
    codec, loader = PromptCodec.load(model, None, False), MediaLoader(recipe, run)

    async def one(engine: Any, row: int) -> PromptGroup:
        prompt = msgspec.msgpack.decode(msgspec.msgpack.encode(source.prompt(row)), type=Prompt)
        media = await loader.open(prompt, spec)
        ids = codec.encode(prompt.content, spec) if media is None else media.token_ids
        samples: list[Sample] = await engine.generate(ids, v.SAMPLING, GROUP, f"row-{row}", media)
        rewards = [float(i == row % GROUP) for i in range(GROUP)]
        answers = [
            Trajectory(row, i, 0, ids, s.token_ids, s.log_probs, s.spans, s.finish, reward=rewards[i])
            for i, s in enumerate(samples)
        ]
        return PromptGroup(prompt, answers)

    async def body() -> list[PromptGroup]:
        engine = make_engine("hf", EngineSettings(model, HfOptions(threads=1), dtype="float32"))
        await engine.start()
        groups = [await one(engine, row) for row in range(len(source))]
        await engine.close()
        return groups

    groups = asyncio.run(body())
    loader.close()
    return groups


def steps_of(groups: list[PromptGroup], ranks: int) -> list[TrainStep]:
    options = BatchOptions(
        data_parallel=ranks, ranks_per_replica=1, micro_batch_tokens=160, micro_batch_size=None,
        aggregation="token_mean",
    )  # fmt: skip
    return train_steps(1, make_samples(groups, options), options)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_two_ranks_train_on_media_as_one_does(family: str, redis_server: RedisServer, tmp_path: Path) -> None:
    """Pictures, a clip and text alone; each rank alone has some kinds of media in some forwards."""
    recipe = make_recipe(v.save_model(tmp_path / "model", family), v.write_rows(tmp_path / "data"))
    run = make_run(tmp_path / "one", recipe, make_plan(recipe))
    groups = groups_of(recipe, run)
    (command,) = steps_of(groups, 1)
    mixed = [{sample.row >= 0 for sample in one.samples} for one in command.micro_batches]
    assert {True, False} in mixed, "text and pictures share no forward"
    trainer = Fsdp2Trainer(make_context(run, recipe))
    trainer.load()
    one = trainer.train_step(command)
    expected = parameters(trainer)
    trainer.close()
    # The learner's log-probs are the engine's: same weights, media, positions.
    assert one["train/mismatch_mean"] < 1e-6
    assert one["train/mismatch_max"] < 1e-5
    assert one["train/sequences"] == 4 * GROUP
    assert one["train/grad_norm"] > 1e-3

    two = make_run(tmp_path / "two", recipe, make_plan(recipe, 2))
    redis_server.write_bus_file(two.bus_file(1))
    commands = [msgspec.msgpack.encode(step) for step in steps_of(groups, 2)]
    out = tmp_path / "ranks.pt"
    arguments = (str(two.root), recipe.model_dump_json(), commands, str(out))
    run_ranks(_rank, 2, tmp_path / "logs", *arguments, group=False)
    found = torch.load(out)
    assert abs(found["metrics"]["train/loss"] - one["train/loss"]) < 1e-5
    assert found["metrics"]["train/mismatch_max"] < 1e-5
    assert found["metrics"]["train/sequences"] == 4 * GROUP
    assert math.isclose(found["metrics"]["train/grad_norm"], one["train/grad_norm"], rel_tol=1e-5)
    assert apart(found["parameters"], expected) < 1e-6


def _rank(rank: int, world_size: int, root: str, recipe_json: str, commands: list[bytes], out: str) -> None:
    recipe, run = Recipe.model_validate_json(recipe_json), RunDir(Path(root))
    context = make_context(run, recipe, rank=rank, world_size=world_size, bus_file=run.bus_file(1))
    plan = context.plan.model_copy(update={"mesh": Mesh(dp_shard=world_size)})
    trainer = Fsdp2Trainer(dataclasses.replace(context, plan=plan))
    trainer.load()
    metrics = trainer.train_step(msgspec.msgpack.decode(commands[rank], type=TrainStep))
    found = parameters(trainer)
    if rank == 0:
        torch.save({"metrics": metrics, "parameters": found}, out)
    dist.barrier()
    trainer.close()


def test_a_picture_that_changed_since_is_named(tmp_path: Path) -> None:
    rows = v.write_rows(tmp_path / "data", clips=False)
    recipe = make_recipe(v.save_model(tmp_path / "model", "qwen3_vl"), rows)
    run = make_run(tmp_path / "run", recipe, make_plan(recipe))
    groups = groups_of(recipe, run)
    v.picture(9, 56, 42).save(rows.parent / "0.png")
    (command,) = steps_of(groups, 1)
    trainer = Fsdp2Trainer(make_context(run, recipe))
    trainer.load()
    with pytest.raises(DataError, match=r"rows\.json: row 0: its images or videos make other tokens here"):
        trainer.train_step(command)
    trainer.close()
    content = json.loads(rows.read_text())
    content[0]["conversations"][0]["value"] = "<image>\nand what is it now?"
    rows.write_text(json.dumps(content))
    loader, prompt = MediaLoader(recipe, run), groups[0].prompt
    with pytest.raises(ValueError, match=r"row 0 of .* is not what the controller read"):
        asyncio.run(loader.open(prompt, recipe.data.train))
    loader.close()


def test_a_placeholder_that_the_policy_wrote_is_trained_but_not_read() -> None:
    sample = TrainSample(
        0, 0, [9, 4, 4, 7, 4], [0, 0, 0, 1, 1], [0.0] * 5, [1.0] * 5, spans=[VersionSpan(0, 3, 5)], row=2
    )
    batch = pack_samples([sample], 1.0, torch.device("cpu"), placeholders=frozenset({4}))
    assert batch.row.input_ids.tolist() == [9, 4, 4, 7, 0]
    assert batch.row.targets.tolist() == [7, 4]
