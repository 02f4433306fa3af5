"""Several optimizer updates in one step: what they are, what they share, and that they count as one step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.algorithms import chunked_head
from hpc_rl.bus.messages import MicroBatch, MiniBatch, TrainStep
from hpc_rl.controller.batch import BatchOptions, loss_denominator, train_steps
from hpc_rl.policy.batching import pack_samples
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.recipe.schema import Recipe
from hpc_rl.types import TrainSample
from tests.policy.sft_runs import SGD
from tests.training import make_context, make_plan, make_recipe, make_run

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
SEED = 3


def trainer_of(
    folder: Path, model: Path, updates: dict[str, int] | None = None, **options: Any
) -> Fsdp2Trainer:
    """`algorithm` and `optimizer` are those sections, plain SGD by default."""
    optimizer = options.pop("optimizer", SGD | {"clip_norm": None})
    plain = make_recipe(folder, model, steps=20, optimizer=optimizer).model_dump()
    plain["policy"]["updates"] = updates or {}
    algorithm = {"name": "grpo", "loss_aggregation": "token_mean", **options}
    recipe = Recipe.model_validate(plain | {"kind": "rl", "algorithm": algorithm, "seed": SEED})
    trainer = Fsdp2Trainer(make_context(make_run(folder, recipe, make_plan(recipe)), recipe))
    trainer.load()
    return trainer


def samples(count: int = 4, version: int = 0) -> list[TrainSample]:
    return [
        TrainSample(
            ordinal=number // 2,
            sample=number % 2,
            token_ids=[5, 6, 30 + number, 31, 32 + number],
            loss_mask=[0, 0, 1, 1, 1],
            log_probs=[0.0, 0.0, -4.5, -4.4, -4.6],
            advantages=[0.0, 0.0] + [1.0 if number % 2 else -1.0] * 3,
            version=version,
        )
        for number in range(count)
    ]


def in_parts(step: int, parts: list[list[TrainSample]]) -> TrainStep:
    counts = [loss_denominator(part, "token_mean") for part in parts]
    mini_batches = [MiniBatch(n, n + 1, count) for n, count in enumerate(counts)]
    return TrainStep(step, [MicroBatch(part) for part in parts], sum(counts), mini_batches)


def order_of(step: int, epoch: int, parts: int) -> list[int]:
    return list(np.random.default_rng((SEED, step, epoch)).permutation(parts))


def weights(trainer: Fsdp2Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.module.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_updates_are_steps_on_the_parts_one_after_the_other(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    (tmp_path / "one").mkdir()
    parts = [samples()[:2], samples()[2:3], samples()[3:]]
    trainer = trainer_of(tmp_path / "many", tiny_model, {"mini_batches": 3, "epochs": 2})
    metrics = trainer.train_step(in_parts(1, parts))
    assert (trainer.step, trainer.optimizer.param_groups[0]["lr"]) == (1, 0.3)
    many = weights(trainer)
    trainer.close()

    alone = trainer_of(tmp_path / "one", tiny_model)
    order = order_of(1, 0, 3) + order_of(1, 1, 3)
    assert order_of(1, 0, 3) != order_of(1, 1, 3), "this seed and step tell the epochs apart"
    each = []
    for number, part in enumerate(order):
        count = loss_denominator(parts[part], "token_mean")
        each.append(alone.train_step(TrainStep(number + 1, [MicroBatch(parts[part])], count)))
    assert same(many, weights(alone))
    alone.close()

    tokens = [one["train/tokens"] for one in each]
    assert metrics["train/tokens"] == sum(tokens) == 24
    assert metrics["train/sequences"] == 8
    for name in ("ratio_mean", "mismatch_mean", "log_prob_mean"):
        mean = sum(one[f"train/{name}"] * t for one, t in zip(each, tokens, strict=True)) / 24
        assert metrics[f"train/{name}"] == pytest.approx(mean, rel=1e-6), name
    for name in ("loss", "grad_norm"):
        mean = sum(one[f"train/{name}"] for one in each) / 6
        assert metrics[f"train/{name}"] == pytest.approx(mean, rel=1e-6, abs=1e-9), name
    assert metrics["train/mismatch_max"] == max(one["train/mismatch_max"] for one in each)


def test_a_part_without_tokens_is_passed_over(tiny_model: Path, tmp_path: Path) -> None:
    empty = samples()[3]
    empty.loss_mask, empty.advantages = [0] * 5, [0.0] * 5
    trainer = trainer_of(tmp_path, tiny_model, {"mini_batches": 2}, optimizer={"lr": 1e-2})
    assert trainer.train_step(in_parts(1, [samples()[:3], [empty]]))["train/tokens"] == 9
    state = next(iter(trainer.optimizer.state.values()))
    assert int(state["step"]) == 1
    before = weights(trainer)
    assert trainer.train_step(in_parts(2, [[empty], [empty]])) == {"train/skipped": 1.0}
    assert same(before, weights(trainer))
    trainer.close()


def fresh(trainer: Fsdp2Trainer) -> list[TrainSample]:
    """Samples as the trainer's present weights would have made them."""
    found = samples(version=trainer.step)
    with torch.no_grad():
        values, _ = trainer.model.log_probs(pack_samples(found, 1.0, trainer.device).row)
    for number, sample in enumerate(found):
        sample.log_probs = [0.0, 0.0, *values[3 * number : 3 * number + 3].tolist()]
    return found


@pytest.mark.parametrize("proximal", ["recompute", "interpolate"])
def test_the_proximal_policy_is_that_of_the_start(proximal: str, tiny_model: Path, tmp_path: Path) -> None:
    """On-policy that is the sampler: the same updates as with the ratio to it."""
    found = []
    for name in ("sampler", proximal):
        (tmp_path / name).mkdir()
        trainer = trainer_of(tmp_path / name, tiny_model, {"mini_batches": 2, "epochs": 3}, proximal=name)
        batch = fresh(trainer)
        metrics = trainer.train_step(in_parts(1, [batch[:2], batch[2:]]))
        found.append((metrics, weights(trainer)))
        trainer.close()
    (sampler, first), (other, second) = found
    assert abs(sampler["train/ratio_mean"] - 1) > 1e-3, "the later updates are off the start"
    assert other["train/ratio_mean"] == pytest.approx(sampler["train/ratio_mean"], rel=1e-5)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_stale_samples_interpolate_between_sampler_and_present(tiny_model: Path, tmp_path: Path) -> None:
    """Made long ago, the start is nearly the present; the recomputed start is in between them, too."""
    ratios = {}
    for name, version in (("sampler", 0), ("recompute", 0), ("interpolate", -1000), ("interpolate", 0)):
        folder = tmp_path / f"{name}{version}"
        folder.mkdir()
        trainer = trainer_of(folder, tiny_model, {"epochs": 3}, proximal=name)
        batch = fresh(trainer)
        for sample in batch:
            sample.version = version
        metrics = trainer.train_step(in_parts(1, [batch]))
        ratios[name, version] = metrics["train/ratio_mean"] - 1
        trainer.close()
    assert abs(ratios["interpolate", -1000]) < 0.01 * abs(ratios["interpolate", 0])
    assert ratios["interpolate", 0] == pytest.approx(ratios["sampler", 0], rel=1e-3)
    assert ratios["recompute", 0] == pytest.approx(ratios["sampler", 0], rel=1e-3)


def test_the_penalty_in_the_reward_reaches_the_advantages(tiny_model: Path, tmp_path: Path) -> None:
    """Equal rewards teach nothing but to be likelier to the reference, which is the policy at first."""
    trainer = trainer_of(tmp_path, tiny_model, kl_beta=0.5, kl_in="reward", optimizer={"lr": 1e-2})
    batch = samples(8)
    for number, sample in enumerate(batch):
        sample.advantages = [0.0, 0.0, 1.0, 1.0, 1.0]  # rewards
        sample.log_probs = [0.0, 0.0, *[-3.0 - number] * 3]
    metrics = trainer.train_step(in_parts(1, [batch]))
    assert metrics["train/advantage_abs_mean"] == pytest.approx(1 / math.sqrt(2), rel=1e-3)
    assert metrics["train/kl_reference"] != 0.0
    trainer.close()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=24),
    mini_batches=st.integers(1, 5),
    ranks=st.integers(1, 4),
    step=st.integers(1, 1000),
)
def test_the_controller_splits_a_step_into_parts_of_one_size(
    lengths: list[int], mini_batches: int, ranks: int, step: int
) -> None:
    found = [
        TrainSample(n, 0, [1] * (length + 1), [0] + [1] * length, [0.0] * (length + 1), [0.0] * (length + 1))
        for n, length in enumerate(lengths)
    ]
    options = BatchOptions(ranks, 1, 40, None, "token_mean", mini_batches=mini_batches, seed=SEED)
    commands = train_steps(step, found, options)
    parts = commands[0].mini_batches or [MiniBatch(0, len(commands[0].micro_batches), sum(lengths))]
    assert len(parts) == min(mini_batches, len(lengths))
    assert [part.start for part in parts[1:]] == [part.end for part in parts[:-1]]
    seen, sizes = [], []
    for part in parts:
        members = [
            sample.ordinal
            for command in commands
            for micro_batch in command.micro_batches[part.start : part.end]
            for sample in micro_batch.samples
        ]
        assert part.denominator == sum(lengths[n] for n in members)
        seen += members
        sizes.append(len(members))
    assert sorted(seen) == list(range(len(lengths)))
    assert max(sizes) - min(sizes) <= 1
    assert len({len(command.micro_batches) for command in commands}) == 1
    assert parts[-1].end == len(commands[0].micro_batches)


def test_gradients_made_in_the_forward_are_those_of_the_logits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of more than one chunk of the head, with the KL to a reference in the loss."""
    found = []
    for name, elements in (("whole", 1 << 23), ("chunks", 5 * 96)):
        monkeypatch.setitem(chunked_head.CHUNK_ELEMENTS, "cpu", elements)
        (tmp_path / name).mkdir()
        trainer = trainer_of(tmp_path / name, tiny_model, kl_beta=0.1)
        steps = [trainer.train_step(TrainStep(n, [MicroBatch(samples(6))], 18.0)) for n in (1, 2)]
        found.append(([one["train/grad_norm"] for one in steps], weights(trainer)))
        trainer.close()
    (norms, whole), (in_chunks, chunks) = found
    assert norms == pytest.approx(in_chunks, rel=1e-5)
    for a, b in zip(whole, chunks, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
