"""The losses against their written formulas in fp64, at their edges, and however the batch is split."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hpc_rl.algorithms.base import TokenBatch, loss_denominator
from hpc_rl.algorithms.config import Correction, GrpoConfig
from hpc_rl.algorithms.grpo import Grpo, grpo_loss
from hpc_rl.algorithms.sft import Sft
from tests.algorithms.batches import make_batch, split

torch.set_num_threads(1)
AGGREGATIONS = ("token_mean", "sequence_mean")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(0, 10_000),
    st.sampled_from(AGGREGATIONS),
    st.sampled_from(["sampler", "recompute"]),
    st.data(),
)
def test_the_gradient_does_not_depend_on_the_split(
    lengths: list[int], seed: int, aggregation: str, proximal: str, data: st.DataObject
) -> None:
    config = GrpoConfig(loss_aggregation=aggregation, proximal=proximal)
    batch, log_probs = make_batch(lengths, seed)
    batch.denominator = loss_denominator([batch], aggregation)
    whole = grpo_loss(batch, log_probs, config)
    (expected,) = torch.autograd.grad(whole.loss, log_probs)

    homes = [data.draw(st.integers(0, 3)) for _ in lengths]
    parts = split(batch, [[s for s, home in enumerate(homes) if home == k] for k in range(4)])
    denominator = loss_denominator([micro for micro, _ in parts], aggregation)
    assert denominator == batch.denominator
    total, tokens = torch.zeros_like(log_probs), 0.0
    for micro, index in parts:  # an empty part has a gradient too: other ranks would wait for it
        micro.denominator = denominator
        output = grpo_loss(micro, log_probs[index], config)
        total += torch.autograd.grad(output.loss, log_probs)[0]
        tokens += float(output.sums["tokens"])
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)
    assert tokens == float(whole.sums["tokens"])


def written_formula(batch: TokenBatch, log_probs: torch.Tensor, config: GrpoConfig) -> torch.Tensor:
    """The docstring of grpo.py, token by token in plain Python."""
    total = log_probs.new_zeros(())
    for s in range(batch.num_sequences):
        tokens = [t for t in range(len(log_probs)) if batch.sequence[t] == s and batch.mask[t] > 0]
        for t in tokens:
            lp, m, a = log_probs[t], batch.sampler_log_probs[t], batch.advantages[t]
            w = 1.0
            if config.proximal == "sampler":
                r = torch.exp(lp - m)
            else:
                r = torch.exp(lp - lp.detach())
                if config.correction.kind == "tis":
                    w = torch.exp(lp.detach() - m).clamp(max=config.correction.cap)
            clipped = torch.min(r * a, r.clamp(1 - config.clip_low, 1 + config.clip_high) * a)
            if a < 0:
                clipped = torch.max(clipped, config.correction.cap * a)
            share = batch.denominator * (len(tokens) if config.loss_aggregation == "sequence_mean" else 1)
            total = total - w * clipped / share
    return total


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_high": 0.28, "correction": Correction(cap=1.3)},
        {"proximal": "recompute", "correction": Correction(cap=1.1)},
        {"proximal": "recompute", "correction": Correction(kind="none")},
    ],
)
def test_grpo_is_the_written_formula(options: dict, aggregation: str) -> None:
    config = GrpoConfig(loss_aggregation=aggregation, **options)
    batch, log_probs = make_batch([5, 1, 7, 3], seed=3)
    batch.denominator = loss_denominator([batch], aggregation)
    ours, written = grpo_loss(batch, log_probs, config).loss, written_formula(batch, log_probs, config)
    torch.testing.assert_close(ours, written, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, log_probs)[0] for loss in (ours, written)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-14)
    assert grads[0].abs().sum() > 0


def test_on_policy_gradient_is_plain_policy_gradient() -> None:
    batch, log_probs = make_batch([6, 4], seed=1)
    batch.sampler_log_probs = log_probs.detach().clone()
    batch.denominator = loss_denominator([batch], "token_mean")
    for proximal in ("sampler", "recompute"):
        loss = grpo_loss(batch, log_probs, GrpoConfig(proximal=proximal)).loss
        (grad,) = torch.autograd.grad(loss, log_probs)
        torch.testing.assert_close(grad, -batch.advantages * batch.mask / batch.denominator)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-500, 500), min_size=1, max_size=6),
    st.sampled_from(["sampler", "recompute"]),
    st.integers(),
)
def test_extreme_ratios_stay_finite_and_bounded(gaps: list[float], proximal: str, seed: int) -> None:
    config = GrpoConfig(proximal=proximal)
    batch, log_probs = make_batch([len(gaps)], seed % 1000, torch.float32)
    batch.sampler_log_probs = log_probs.detach() - torch.tensor(gaps)
    batch.mask = torch.ones(len(gaps))
    batch.denominator = float(len(gaps))
    output = grpo_loss(batch, log_probs, config)
    (grad,) = torch.autograd.grad(output.loss, log_probs)
    assert torch.isfinite(grad).all()
    cap = max(config.correction.cap, 1 + config.clip_high)
    assert (grad.abs() <= cap * batch.advantages.abs() / len(gaps) + 1e-6).all()
    assert all(torch.isfinite(v) for v in [*output.sums.values(), *output.maxima.values()])


def test_non_finite_sampler_log_probs_leave_mask_and_denominator() -> None:
    config = GrpoConfig()
    batch, log_probs = make_batch([4, 4], seed=7)
    batch.mask = torch.ones(8, dtype=torch.float64)
    batch.sampler_log_probs[[1, 5, 6]] = torch.tensor([float("-inf"), float("nan"), float("inf")]).double()
    assert loss_denominator([batch], "token_mean") == 5
    batch.denominator = 5
    output = grpo_loss(batch, log_probs, config)
    (grad,) = torch.autograd.grad(output.loss, log_probs)
    assert float(output.sums["tokens"]) == 5
    assert torch.nonzero(grad).flatten().tolist() == [0, 2, 3, 4, 7] or (grad[[1, 5, 6]] == 0).all()
    kept = [0, 2, 3, 4, 7]
    pieces = [t[kept] for t in (batch.targets, batch.mask, batch.sequence)]
    small = TokenBatch(*pieces, 2, 5, batch.sampler_log_probs[kept], batch.advantages[kept])
    torch.testing.assert_close(grpo_loss(small, log_probs[kept], config).loss, output.loss)


@pytest.mark.parametrize("algorithm", [Grpo(GrpoConfig()), Sft()])
def test_an_all_masked_micro_batch_is_a_zero_with_a_graph(algorithm: Grpo | Sft) -> None:
    batch, log_probs = make_batch([3, 2], seed=0)
    batch.mask = torch.zeros(5, dtype=torch.float64)
    for denominator in (0.0, 12.0):
        batch.denominator = denominator
        output = algorithm.loss(batch, log_probs, torch.zeros(5))
        assert float(output.loss.detach()) == 0.0
        (grad,) = torch.autograd.grad(output.loss, log_probs)
        assert (grad == 0).all()


def test_sft_is_the_mean_cross_entropy_of_the_kept_tokens() -> None:
    batch, log_probs = make_batch([3, 4], seed=2)
    batch.denominator = float(batch.mask.sum())
    torch.testing.assert_close(Sft().loss(batch, log_probs).loss, -log_probs[batch.mask > 0].mean())


def test_options_that_do_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="proximal: recompute"):
        GrpoConfig(correction=Correction(kind="none"))


def test_tokens_at_the_floor_of_dual_clip_are_counted_as_clipped() -> None:
    batch, log_probs = make_batch([3], seed=0)
    batch.mask, batch.denominator = torch.ones(3, dtype=torch.float64), 3.0
    batch.advantages = torch.tensor([-1.0, -1.0, 1.0]).double()
    batch.sampler_log_probs = log_probs.detach() - torch.tensor([3.0, 1.5, 1.5]).double().log()
    output = grpo_loss(batch, log_probs, GrpoConfig())  # ratios 3, 1.5, 1.5; cap 2
    (grad,) = torch.autograd.grad(output.loss, log_probs)
    assert [bool(g) for g in grad] == [False, True, False]
    assert float(output.sums["clip_fraction"]) == 2


def test_several_steps_per_batch_take_the_ratio_to_the_start() -> None:
    config = GrpoConfig(proximal="recompute", correction=Correction(kind="none"))
    batch, log_probs = make_batch([5, 4], seed=5)
    batch.denominator = loss_denominator([batch], "token_mean")
    batch.proximal_log_probs = log_probs.detach() - math.log(1.5)  # clipped where the advantage is positive
    (grad,) = torch.autograd.grad(grpo_loss(batch, log_probs, config).loss, log_probs)
    assert batch.advantages is not None
    assert (grad[batch.advantages > 0] == 0).all()
    kept = (batch.advantages < 0) & (batch.mask > 0)
    torch.testing.assert_close(grad[kept], -1.5 * batch.advantages[kept] / batch.denominator)
    assert kept.any()
