"""The real trainer split over two tensor-parallel ranks: steps, checkpoint, export, and GRPO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hpc_rl.bus.messages import TrainStep
from hpc_rl.bus.server import RedisServer
from hpc_rl.controller.batch import BatchOptions, train_steps
from hpc_rl.plan.schema import Mesh
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from hpc_rl.types import TrainSample
from tests.policy.sft_runs import SGD, fresh, parameters, save, start, train
from tests.ranks import run_ranks
from tests.tiny_models import save_model, save_tokenizer
from tests.training import make_context, make_plan, make_recipe, make_run

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.slow]
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts: its fused halves are split each, its heads have norms of their own."""
    folder = tmp_path_factory.mktemp("experts")
    return save_tokenizer(save_model(folder, "qwen3_moe"))


def split_trainer(rank: int, world_size: int, root: str, recipe: Recipe, attempt: int) -> Fsdp2Trainer:
    run = RunDir(Path(root))
    context = make_context(
        run, recipe, rank=rank, world_size=world_size, bus_file=run.bus_file(attempt), attempt=attempt
    )
    return Fsdp2Trainer(replace(context, plan=context.plan.model_copy(update={"mesh": Mesh(tp=world_size)})))


def on_two_ranks(function: object, folder: Path, recipe: Recipe, server: RedisServer, attempt: int) -> RunDir:
    """Run `function` as two ranks; what it leaves in `result.pt` of the run is for the test. They meet in a
    Redis that tests share, under a number of an attempt that must be their own."""
    run = make_run(folder, recipe, make_plan(recipe, 2))
    server.write_bus_file(run.bus_file(attempt))
    arguments = (str(run.root), recipe.model_dump_json(), attempt)
    run_ranks(function, 2, folder, *arguments, group=False)  # type: ignore[arg-type]
    return run


def sft_ranks(rank: int, world_size: int, root: str, recipe_json: str, attempt: int) -> None:
    recipe = Recipe.model_validate_json(recipe_json)
    trainer = split_trainer(rank, world_size, root, recipe, attempt)
    assert trainer.load() == 0
    run = RunDir(Path(root))
    losses = train(trainer, 1, 3)
    save(trainer, run, 3)
    losses += train(trainer, 4, 6)
    trainer.export(6, "final", run.safetensors / "final")
    for exported in trainer.finish():
        assert not exported.error
    values = parameters(trainer)
    if rank == 0:
        torch.save((losses, values), run.root / "result.pt")
    dist.barrier()
    trainer.close()


def test_sft_checkpoint_and_export(experts: Path, tmp_path: Path, redis_server: RedisServer) -> None:
    recipe = make_recipe(tmp_path, experts, steps=6, optimizer=SGD)
    _, one = fresh(tmp_path / "one", recipe)
    losses, expected = train(one, 1, 6), parameters(one)
    one.close()
    run = on_two_ranks(sft_ranks, tmp_path / "two", recipe, redis_server, 71)
    two, values = torch.load(run.root / "result.pt")
    assert max(abs(a - b) for a, b in zip(losses, two, strict=True)) <= 1e-5
    assert max(float((values[n] - v).abs().max()) for n, v in expected.items()) <= 1e-5
    before = load_file(experts / "model.safetensors")
    exported = load_file(run.safetensors / "final" / "model.safetensors")
    assert exported.keys() == before.keys()
    assert torch.equal(exported["model.layers.0.mlp.gate.weight"], values["model.layers.0.mlp.gate.weight"])
    joined = torch.cat(
        [exported[f"model.layers.0.mlp.experts.1.{part}_proj.weight"] for part in ("gate", "up")]
    )
    assert torch.equal(joined, values["model.layers.0.mlp.experts.gate_up_proj"][1])
    # Its checkpoint goes on in one process.
    again = start(run, recipe, attempt=73, step=3)
    rest = train(again, 4, 6)
    again.close()
    assert max(abs(a - b) for a, b in zip(losses[3:], rest, strict=True)) <= 1e-5


def rl_recipe(recipe: Recipe) -> Recipe:
    """With a reference, which is split as the policy is, and an entropy bonus."""
    algorithm = {"name": "grpo", "kl_beta": 0.1, "entropy_beta": 0.01}
    return Recipe.model_validate(recipe.model_dump() | {"kind": "rl", "algorithm": algorithm})


def grpo_commands(ranks: int) -> list[list[TrainStep]]:
    """Two steps on made-up answers, as the controller packs them for `ranks` tensor-parallel ranks."""
    generator = torch.Generator().manual_seed(0)
    options = BatchOptions(
        data_parallel=1, ranks_per_replica=ranks, micro_batch_tokens=24, micro_batch_size=None,
        aggregation="token_mean",
    )  # fmt: skip
    steps = []
    for step in (1, 2):
        samples = []
        for number in range(8):
            size = 3 + number % 4
            ids = torch.randint(5, 90, (2 + size,), generator=generator).tolist()
            advantage = [0.0, 0.0] + [0.5 - number / 7] * size
            samples.append(
                TrainSample(0, number, ids, [0, 0] + [1] * size, [0.0, 0.0] + [-4.5] * size, advantage)
            )
        steps.append(train_steps(step, samples, options))
    return steps


def grpo_ranks(rank: int, world_size: int, root: str, recipe_json: str, attempt: int) -> None:
    trainer = split_trainer(rank, world_size, root, Recipe.model_validate_json(recipe_json), attempt)
    trainer.load()
    metrics = [trainer.train_step(commands[rank]) for commands in grpo_commands(world_size)]
    if rank == 0:
        torch.save(metrics, Path(root) / "result.pt")
    dist.barrier()
    trainer.close()


def test_grpo_as_the_controller_packs_it(experts: Path, tmp_path: Path, redis_server: RedisServer) -> None:
    recipe = rl_recipe(make_recipe(tmp_path, experts, steps=2, optimizer=SGD))
    _, one = fresh(tmp_path / "one", recipe)
    expected = [one.train_step(commands[0]) for commands in grpo_commands(1)]
    one.close()
    run = on_two_ranks(grpo_ranks, tmp_path / "two", recipe, redis_server, 72)
    for ours, theirs in zip(torch.load(run.root / "result.pt"), expected, strict=True):
        assert ours["train/tokens"] == theirs["train/tokens"]
        names = ("loss", "grad_norm", "ratio_mean", "mismatch_mean", "sequences", "kl_reference", "entropy")
        for name in names:
            key = f"train/{name}"
            assert abs(ours[key] - theirs[key]) <= 1e-5 * max(1.0, abs(theirs[key])), key
