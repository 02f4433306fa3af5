"""On-policy distillation against its written formula and the KL that it is the gradient of."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hpc_rl.algorithms.base import TokenBatch, loss_denominator
from hpc_rl.algorithms.config import Correction, DistillConfig
from hpc_rl.algorithms.distill import Distill
from tests.algorithms.batches import make_batch, split

torch.set_num_threads(1)


def taught(
    lengths: list[int], seed: int, dtype: torch.dtype = torch.float64
) -> tuple[TokenBatch, torch.Tensor]:
    batch, log_probs = make_batch(lengths, seed, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(len(log_probs), generator=generator, dtype=torch.float64).to(dtype)
    return replace(batch, teacher_log_probs=log_probs.detach() + noise), log_probs


def written(batch: TokenBatch, log_probs: torch.Tensor, config: DistillConfig) -> torch.Tensor:
    """The docstring of distill.py, token by token."""
    total = log_probs.new_zeros(())
    for t, lp in enumerate(log_probs):
        if batch.mask[t] == 0:
            continue
        m, old = batch.sampler_log_probs[t], lp.detach()
        weight = torch.exp(old - m).clamp(max=config.is_cap)
        if config.proximal == "recompute":
            weight = torch.exp(old - m).clamp(max=config.correction.cap)
        advantage = batch.advantages[t] + config.teacher_coef * (batch.teacher_log_probs[t] - old)
        total = total - weight * advantage * lp / batch.denominator
    return total


@pytest.mark.parametrize(
    "config",
    [
        DistillConfig(),
        DistillConfig(teacher_coef=0.3, is_cap=1.1),
        DistillConfig(proximal="recompute", correction=Correction(cap=1.2)),
    ],
)
def test_the_loss_and_gradient_are_the_written_ones(config: DistillConfig) -> None:
    batch, log_probs = taught([5, 1, 7], seed=3)
    batch.denominator = loss_denominator([batch], "token_mean")
    losses = [Distill(config).loss(batch, log_probs, None).loss, written(batch, log_probs, config)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, log_probs)[0] for loss in losses]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-14)
    assert grads[0].abs().sum() > 0


def test_on_policy_the_gradient_is_that_of_the_reverse_kl() -> None:
    """Its expectation over all tokens of a small vocabulary, with samples of the policy itself and of an
    older one (the correction then makes it the same)."""
    generator = torch.Generator().manual_seed(0)
    theirs, old, start = torch.randn(3, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    logits = start.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - theirs)).sum(), logits, retain_graph=True)
    for sampler in (policy.detach(), old):
        found = torch.zeros_like(exact)
        for token in range(7):
            batch = TokenBatch(
                *(torch.tensor([token]), torch.ones(1).double(), torch.zeros(1).long(), 1, 1.0),
                sampler_log_probs=sampler[token : token + 1],
                advantages=torch.zeros(1).double(),
                teacher_log_probs=theirs[token : token + 1],
            )
            loss = Distill(DistillConfig(is_cap=1e6)).loss(batch, policy[token : token + 1], None).loss
            (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
            found += sampler[token].exp() * grad
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 10_000), st.data())
def test_the_gradient_does_not_depend_on_the_split(
    lengths: list[int], seed: int, data: st.DataObject
) -> None:
    algorithm = Distill(DistillConfig())
    batch, log_probs = taught(lengths, seed)
    batch.denominator = loss_denominator([batch], "token_mean")
    (expected,) = torch.autograd.grad(algorithm.loss(batch, log_probs, None).loss, log_probs)
    homes = [data.draw(st.integers(0, 3)) for _ in lengths]
    total = torch.zeros_like(log_probs)
    for micro, index in split(batch, [[s for s, home in enumerate(homes) if home == k] for k in range(4)]):
        micro.denominator, micro.teacher_log_probs = batch.denominator, batch.teacher_log_probs[index]
        total += torch.autograd.grad(algorithm.loss(micro, log_probs[index], None).loss, log_probs)[0]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-14)


def test_a_token_that_the_teacher_did_not_score_is_left_out() -> None:
    batch, log_probs = taught([4, 3], seed=5)
    batch.mask = torch.ones_like(batch.mask)
    unknown = torch.tensor([False, True, False, False, True, False, False])
    left = replace(batch, mask=(~unknown).double(), denominator=5.0)
    without = Distill(DistillConfig()).loss(left, log_probs, None)
    for bad in (math.nan, -math.inf):
        batch.teacher_log_probs[unknown] = bad
        batch.denominator = 5.0
        output = Distill(DistillConfig()).loss(batch, log_probs, None)
        assert output.sums["tokens"] == 5
        assert output.sums["kl_teacher"] == without.sums["kl_teacher"]
        grads = [torch.autograd.grad(x.loss, log_probs, retain_graph=True)[0] for x in (output, without)]
        torch.testing.assert_close(grads[0], grads[1])
        assert (grads[0][unknown] == 0).all()


def test_a_teacher_that_rules_a_token_out_is_bounded() -> None:
    batch, log_probs = taught([3], seed=1, dtype=torch.float32)
    batch.mask, batch.denominator = torch.ones(3), 3.0
    batch.teacher_log_probs = torch.tensor([-1e6, -3.0, 0.0])
    output = Distill(DistillConfig()).loss(batch, log_probs, None)
    (grad,) = torch.autograd.grad(output.loss, log_probs)
    assert torch.isfinite(grad).all()
    assert grad[0].abs() <= 2 * (20 + batch.advantages[0].abs()) / 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drop_zero_variance": True}, "equal rewards"),
        ({"kl_beta": 0.1, "kl_in": "reward"}, "must be loss"),
        ({"teacher_coef": 0.0}, "greater than 0"),
    ],
)
def test_options_that_would_contradict_it(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DistillConfig(**options)
