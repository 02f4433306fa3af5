"""What holds for every algorithm: its written formula, and the same gradient however a batch is dealt out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.algorithms.base import TokenBatch, loss_denominator
from hpc_rl.algorithms.core import PolicyGradient, kl_penalty, policy_loss
from hpc_rl.controller import batch as controller_batch
from hpc_rl.data.packing import pack
from hpc_rl.recipe.extensions import registry
from hpc_rl.types import TrainSample
from tests.algorithms.batches import make_batch, pick, split
from tests.algorithms.written import CASES

torch.set_num_threads(1)
RL = sorted({name for name, _, _ in CASES.values()})
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def algorithm(case: str) -> PolicyGradient:
    name, options, _ = CASES[case]
    found: PolicyGradient = registry("algorithms").load(name)(registry("algorithms").config(name, options))
    return found


def denominator(one: PolicyGradient, batches: list[TokenBatch]) -> float:
    return loss_denominator(batches, one.config.loss_aggregation, one.config.loss_length)


def share(one: PolicyGradient, batch: TokenBatch, log_probs: torch.Tensor) -> Any:
    return one.loss(batch, log_probs, torch.zeros_like(log_probs))


def gradient(one: PolicyGradient, batch: TokenBatch, log_probs: torch.Tensor) -> torch.Tensor:
    batch.denominator = denominator(one, [batch])
    return torch.autograd.grad(share(one, batch, log_probs).loss, log_probs)[0]


def test_every_algorithm_on_rollouts_is_among_the_cases() -> None:
    """Distillation has a teacher beside what these batches have: `test_distill.py`."""
    assert set(RL) == set(registry("algorithms").names()) - {"sft", "dpo", "distill"}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.8])
def test_it_is_the_written_formula(case: str, noise: float) -> None:
    one, written = algorithm(case), CASES[case][2]
    for seed in range(3):
        batch, log_probs = make_batch([5, 1, 7, 3, 2, 6], seed, noise=noise)
        batch.denominator = denominator(one, [batch])
        ours, theirs = share(one, batch, log_probs).loss, written(batch, log_probs)
        grads = [torch.autograd.grad(loss, log_probs)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 10_000), data=st.data())
def test_the_gradient_does_not_depend_on_ranks_and_micro_batches(
    case: str, lengths: list[int], seed: int, data: st.DataObject
) -> None:
    """Four micro-batches anywhere, in two ranks or one: shares add up. An empty one takes part too."""
    one = algorithm(case)
    batch, log_probs = make_batch(lengths, seed)
    batch.denominator = denominator(one, [batch])
    whole = share(one, batch, log_probs)
    (expected,) = torch.autograd.grad(whole.loss, log_probs)

    homes = [data.draw(st.integers(0, 3)) for _ in lengths]
    parts = split(batch, [[s for s, home in enumerate(homes) if home == k] for k in range(4)])
    assert denominator(one, [micro for micro, _ in parts]) == batch.denominator
    total, sums = torch.zeros_like(log_probs), dict.fromkeys(whole.sums, 0.0)
    for micro, index in parts:
        micro.denominator = batch.denominator
        output = share(one, micro, log_probs[index])
        total += torch.autograd.grad(output.loss, log_probs)[0]
        sums = {name: value + float(output.sums[name]) for name, value in sums.items()}
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-14)
    for name, value in sums.items():
        assert value == pytest.approx(float(whole.sums[name]), rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("name", RL)
def test_the_controller_counts_the_same_denominator_and_packs_without_a_change(name: str) -> None:
    config = registry("algorithms").config(name, {})
    batch, log_probs = make_batch([5, 1, 7, 3, 2, 6, 4], seed=11)
    samples = [
        TrainSample(s, 0, [1, *ids], [0, *mask], [], [])
        for s, (ids, mask) in enumerate(
            ([0] * int((batch.sequence == s).sum()), batch.mask[batch.sequence == s].int().tolist())
            for s in range(batch.num_sequences)
        )
    ]
    length = config.loss_length or 30
    counted = controller_batch.loss_denominator(samples, config.loss_aggregation, length)
    assert counted == loss_denominator([batch], config.loss_aggregation, length)

    one: PolicyGradient = registry("algorithms").load(name)(config)
    batch.denominator = counted
    (expected,) = torch.autograd.grad(share(one, batch, log_probs).loss, log_probs)
    total = torch.zeros_like(log_probs)
    for rank in pack([len(sample.token_ids) for sample in samples], 12, 2):
        for micro, index in split(batch, rank):
            micro.denominator = counted
            total += torch.autograd.grad(share(one, micro, log_probs[index]).loss, log_probs)[0]
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("case", [case for case in CASES if "KL" not in case])
def test_groups_without_variance_change_nothing(case: str) -> None:
    batch, log_probs = make_batch([4, 6, 3], seed=2)
    batch.advantages = torch.zeros_like(log_probs)
    assert (gradient(algorithm(case), batch, log_probs) == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_an_all_masked_micro_batch_is_a_zero_with_a_graph(case: str) -> None:
    batch, log_probs = make_batch([3, 2], seed=0)
    batch.mask = torch.zeros(5, dtype=torch.float64)
    for count in (0.0, 12.0):
        batch.denominator = count
        output = share(algorithm(case), batch, log_probs)
        assert float(output.loss.detach()) == 0.0
        (grad,) = torch.autograd.grad(output.loss, log_probs)
        assert (grad == 0).all()
        assert all(float(value) == 0 for value in output.sums.values())


@pytest.mark.parametrize("case", CASES)
def test_a_token_without_a_sampler_log_prob_is_as_if_it_were_not_there(case: str) -> None:
    one = algorithm(case)
    batch, log_probs = make_batch([4, 4, 2], seed=7)
    batch.mask = torch.ones(10, dtype=torch.float64)
    bad = [1, 5, 6, 8, 9]  # the last sequence has no token left
    batch.sampler_log_probs[bad] = torch.tensor([-np.inf, np.nan, np.inf, np.nan, np.nan]).double()
    grad = gradient(one, batch, log_probs)
    kept = [0, 2, 3, 4, 7]
    small = pick(batch, torch.tensor(kept), batch.sequence[kept], 2)
    without = log_probs.detach()[kept].requires_grad_()
    assert (grad[bad] == 0).all()
    torch.testing.assert_close(grad[kept], gradient(one, small, without), rtol=1e-12, atol=0)
    assert batch.denominator == small.denominator


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=15, deadline=None)
@given(gaps=st.lists(st.floats(-500, 500), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_extreme_ratios_stay_finite_and_bounded(case: str, gaps: list[float], seed: int) -> None:
    one = algorithm(case)
    batch, log_probs = make_batch([len(gaps)], seed, torch.float32)
    batch.sampler_log_probs = log_probs.detach() - torch.tensor(gaps)
    batch.mask = torch.ones(len(gaps))
    batch.denominator = denominator(one, [batch])
    output = share(one, batch, log_probs)
    (grad,) = torch.autograd.grad(output.loss, log_probs)
    assert torch.isfinite(grad).all()
    assert (grad.abs() <= 5.0 * batch.advantages.abs() + 0.1 + 1e-6).all()  # 5 is the largest cap
    assert all(torch.isfinite(v) for v in [*output.sums.values(), *output.maxima.values()])


@pytest.mark.parametrize("kind", ["icepop", "sequence_mask"])
def test_masks_with_the_ratio_to_the_sampler_drop_tokens_and_add_no_weight(kind: str) -> None:
    config = registry("algorithms").config("grpo", {"correction": {"kind": kind, "low": 0.9, "high": 1.1}})
    masked = registry("algorithms").load("grpo")(config)
    batch, log_probs = make_batch([4, 3, 5], seed=4, noise=0.2)
    grad, plain = gradient(masked, batch, log_probs), gradient(algorithm("grpo"), batch, log_probs)
    ratio = torch.exp(log_probs.detach() - batch.sampler_log_probs)
    if kind == "sequence_mask":
        for s in range(3):
            tokens = (batch.sequence == s) & (batch.mask > 0)
            ratio[batch.sequence == s] = torch.exp(ratio[tokens].log().mean())
    inside = (ratio > 0.9) & (ratio < 1.1) & (batch.mask > 0)
    torch.testing.assert_close(grad, torch.where(inside, plain, torch.zeros_like(plain)))
    dropped = share(masked, batch, log_probs).sums["dropped_fraction"]
    assert float(dropped) == float(batch.mask.sum() - inside.sum()) > 0


def test_the_numbers_before_truncation() -> None:
    """ESS = (sum w)^2 / (N sum w^2): 1 on-policy, less the more the weights differ."""
    one = algorithm("gspo")
    sizes = {}
    for noise in (0.0, 1.0):
        batch, log_probs = make_batch([30, 30], seed=1, noise=noise)
        sums = share(one, batch, log_probs).sums
        weights = torch.exp(log_probs.detach() - batch.sampler_log_probs)[batch.mask > 0]
        expected = float(weights.sum() ** 2 / (len(weights) * weights.square().sum()))
        n = float(sums["tokens"])
        sizes[noise] = float((sums["importance_mean"] / n) ** 2 / (sums["importance_square"] / n))
        assert sizes[noise] == pytest.approx(expected, rel=1e-12)
    assert sizes[0.0] == pytest.approx(1.0, abs=1e-12)
    assert sizes[1.0] < 0.7


def test_kl_estimators_on_a_known_pair_of_distributions() -> None:
    """Their means are the KL (k2's nearly); the gradients of k2 and k3_k2 are its gradient, k1's is 0."""
    logits = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.1, 0.5, 0.4], dtype=torch.float64).log_softmax(-1)
    p = logits.log_softmax(-1)
    exact = (p.exp() * (p - reference)).sum()
    (slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    weights = p.detach().exp()  # the mean over tokens drawn from the policy
    means = {name: (weights * kl_penalty(name, p, reference)).sum() for name in ("k1", "k2", "k3", "k3_k2")}
    slopes = {name: torch.autograd.grad(mean, logits, retain_graph=True)[0] for name, mean in means.items()}
    for name in ("k1", "k3", "k3_k2"):
        torch.testing.assert_close(means[name], exact)
    assert float((means["k2"] / exact).detach()) == pytest.approx(1.0, abs=0.2)
    for name in ("k2", "k3_k2"):
        torch.testing.assert_close(slopes[name], slope)
    assert slopes["k1"].abs().max() < 1e-12 < 1e-3 < (slopes["k3"] - slope).abs().max()
    with pytest.raises(ValueError, match="known: k1, k2, k3, k3_k2"):
        kl_penalty("k4", p, reference)


def test_the_penalty_is_weighed_like_the_tokens() -> None:
    plain = algorithm("grpo")
    config = plain.config.model_copy(update={"kl_beta": 0.3})  # no recipe can: there is no reference model
    batch, log_probs = make_batch([4, 3], seed=9)
    batch.denominator = denominator(plain, [batch])
    batch.reference_log_probs = log_probs.detach() + 0.5
    batch.reference_log_probs[batch.mask == 0] = float("nan")
    with_penalty = policy_loss(batch, log_probs, config, plain.surrogate).loss
    expected = 0.3 * float(torch.exp(torch.tensor(0.5)) - 0.5 - 1)  # k3, the same at every token
    assert float((with_penalty - share(plain, batch, log_probs).loss).detach()) == pytest.approx(
        expected, rel=1e-6
    )
    (grad,) = torch.autograd.grad(with_penalty - share(plain, batch, log_probs).loss, log_probs)
    torch.testing.assert_close(grad, -0.3 * 0.5 * batch.mask / batch.denominator)
