"""DPO against its written formula in fp64 and TRL's, however pairs are split, and at its edges."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hpc_rl.algorithms.base import TokenBatch
from hpc_rl.algorithms.config import DpoConfig
from hpc_rl.algorithms.dpo import Dpo

torch.set_num_threads(1)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2, "nll_weight": 0.7},
    {"reference": False},
    {"reference": False, "length_normalize": True, "gamma": 0.5, "beta": 2.0},
    {"loss": "ipo"},
    {"loss": "ipo", "reference": False, "nll_weight": 1.0},
    {"loss": "hinge", "beta": 0.6},
    {"loss": "hinge", "length_normalize": True, "beta": 3.0},
]


def make_pairs(
    lengths: list[tuple[int, int]], seed: int, dtype: torch.dtype = torch.float64
) -> tuple[TokenBatch, torch.Tensor]:
    """Pairs of so many tokens on each side, some masked; trainer log-probs [N] that need a gradient."""
    generator = torch.Generator().manual_seed(seed)
    flat = [length for pair in lengths for length in pair]
    n = sum(flat)
    log_probs, reference = torch.randn(2, n, generator=generator, dtype=torch.float64).to(dtype) - 3
    sequence = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(flat))
    mask = (torch.rand(n, generator=generator) > 0.3).to(dtype)
    targets = torch.zeros(n, dtype=torch.long)
    batch = TokenBatch(targets, mask, sequence, len(flat), 0.0, reference_log_probs=reference)
    batch.denominator = float(sum(all(counts) for counts in tokens_of(batch)))
    return batch, log_probs.requires_grad_()


def tokens_of(batch: TokenBatch) -> list[tuple[int, int]]:
    counts = [int(batch.mask[batch.sequence == s].sum()) for s in range(batch.num_sequences)]
    return list(zip(counts[::2], counts[1::2], strict=True))


def written(batch: TokenBatch, log_probs: torch.Tensor, config: DpoConfig) -> torch.Tensor:
    """The docstring of dpo.py, pair by pair."""
    total = log_probs.new_zeros(())
    for pair, counts in enumerate(tokens_of(batch)):
        if not all(counts):
            continue
        scores = []
        for side, count in zip((0, 1), counts, strict=True):
            here = [
                t for t in range(len(log_probs)) if batch.sequence[t] == 2 * pair + side and batch.mask[t] > 0
            ]
            held = [batch.reference_log_probs[t] if config.reference else 0.0 for t in here]
            score = sum(log_probs[t] - r for t, r in zip(here, held, strict=True))
            scores.append(score / count if config.length_normalize or config.loss == "ipo" else score)
            if side == 0:
                total = total - config.nll_weight * sum(log_probs[t] for t in here) / count
        h, e = scores[0] - scores[1], config.label_smoothing
        if config.loss == "ipo":
            total = total + (h - 1 / (2 * config.beta)) ** 2
        elif config.loss == "hinge":
            total = total + torch.relu(1 - config.beta * h)
        else:
            z = config.beta * h - config.gamma
            total = total - (1 - e) * torch.log(torch.sigmoid(z)) - e * torch.log(torch.sigmoid(-z))
    return total / batch.denominator


@pytest.mark.parametrize("options", OPTIONS)
def test_dpo_is_the_written_formula(options: dict[str, Any]) -> None:
    config = DpoConfig(**options)
    batch, log_probs = make_pairs([(5, 3), (1, 7), (6, 6), (2, 1)], seed=4)
    assert 0 < batch.denominator < 4  # a pair without tokens on one side counts nowhere
    losses = [Dpo(config).loss(batch, log_probs).loss, written(batch, log_probs, config)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, log_probs)[0] for loss in losses]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-14)
    assert grads[0].abs().sum() > 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6),
    st.integers(0, 10_000),
    st.sampled_from(OPTIONS),
    st.data(),
)
def test_neither_gradient_nor_numbers_depend_on_the_split(
    lengths: list[tuple[int, int]], seed: int, options: dict[str, Any], data: st.DataObject
) -> None:
    algorithm = Dpo(DpoConfig(**options))
    batch, log_probs = make_pairs(lengths, seed)
    whole = algorithm.loss(batch, log_probs)
    (expected,) = torch.autograd.grad(whole.loss, log_probs)
    homes = [data.draw(st.integers(0, 3)) for _ in lengths]
    total, numbers = torch.zeros_like(log_probs), dict.fromkeys({**whole.sums, **whole.shares}, 0.0)
    for home in range(4):  # an empty micro-batch has a gradient too: other ranks would wait for it
        pairs = [pair for pair, at in enumerate(homes) if at == home]
        wanted = [2 * pair + side for pair in pairs for side in (0, 1)]
        index = torch.cat([torch.nonzero(batch.sequence == s).flatten() for s in wanted] or [torch.arange(0)])
        renumbered = torch.tensor([wanted.index(int(s)) for s in batch.sequence[index]], dtype=torch.long)
        micro = TokenBatch(
            *(batch.targets[index], batch.mask[index], renumbered, max(1, len(wanted)), batch.denominator),
            reference_log_probs=batch.reference_log_probs[index],
        )
        output = algorithm.loss(micro, log_probs[index])
        total += torch.autograd.grad(output.loss, log_probs)[0]
        for name, value in {**output.sums, **output.shares}.items():
            numbers[name] += float(value)
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-14)
    for name, value in {**whole.sums, **whole.shares}.items():
        assert numbers[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12)


def test_a_policy_equal_to_its_reference_is_undecided() -> None:
    batch, log_probs = make_pairs([(4, 5), (3, 3)], seed=1)
    batch.mask = torch.ones_like(batch.mask)
    batch.denominator, batch.reference_log_probs = 2.0, log_probs.detach().clone()
    output = Dpo(DpoConfig(beta=0.5)).loss(batch, log_probs)
    assert output.loss.item() == pytest.approx(math.log(2))
    assert [float(output.shares[name]) for name in ("accuracy", "margin", "rewards_chosen")] == [0, 0, 0]
    assert float(output.sums["kl_reference"]) == 0
    (grad,) = torch.autograd.grad(output.loss, log_probs)
    # d/dl of -log sigma(beta h) at h = 0 is -beta / 2 on what was chosen, and as much up on the rest.
    torch.testing.assert_close(grad, torch.where(batch.sequence % 2 == 0, -0.125, 0.125).double())


def test_the_numbers_are_those_of_the_pairs() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-2.0, -2.0, -3.0, -1.0], dtype=torch.float64)
    sequence = torch.tensor([0, 1, 2, 3])
    batch = TokenBatch(sequence, torch.ones(4).double(), sequence, 4, 2.0, reference_log_probs=reference)
    shares = Dpo(DpoConfig(beta=0.5)).loss(batch, log_probs).shares
    found = {name: float(value) for name, value in shares.items()}
    assert found == {
        "accuracy": 1.0,  # s = 1, 0 and -1, -2
        "margin": 0.5,
        "rewards_chosen": 0.0,
        "rewards_rejected": -0.5,
        "log_prob_chosen": -2.5,
        "log_prob_rejected": -2.5,
    }


@pytest.mark.parametrize("options", OPTIONS)
def test_extremes_and_masked_tokens_stay_finite(options: dict[str, Any]) -> None:
    algorithm = Dpo(DpoConfig(**options))
    for gap in (1e4, -1e4):
        batch, log_probs = make_pairs([(3, 3), (2, 4)], seed=2, dtype=torch.float32)
        batch.mask = torch.tensor([1.0, 1, 0] * 2 + [1, 1] + [1, 0, 1, 1])
        batch.denominator = 2.0
        with torch.no_grad():
            log_probs[batch.sequence % 2 == 0] += gap
            log_probs[batch.mask == 0] = -math.inf
        batch.reference_log_probs[batch.mask == 0] = math.nan
        output = algorithm.loss(batch, log_probs)
        (grad,) = torch.autograd.grad(output.loss, log_probs)
        assert torch.isfinite(output.loss)
        assert torch.isfinite(grad).all()
        assert (grad[batch.mask == 0] == 0).all()
        assert all(math.isfinite(float(value)) for value in {**output.sums, **output.shares}.values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing belongs to loss: sigmoid"),
        ({"loss": "hinge", "gamma": 0.1}, "gamma belongs to loss: sigmoid"),
        ({"loss": "ipo", "length_normalize": True}, "ipo always takes means"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"beta": 0.0}, "greater than 0"),
    ],
)
def test_options_that_would_do_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DpoConfig(**options)


# --- TRL's -------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "sigmoid"),
        ({"beta": 0.3, "length_normalize": True}, "sigmoid_norm"),
        ({"loss": "ipo", "beta": 0.3}, "ipo"),
        ({"loss": "hinge"}, "hinge"),
    ],
)
def test_the_loss_and_gradient_are_those_of_trl(options: dict[str, Any], name: str) -> None:
    """`_compute_loss` of a trainer that was never built, given log-probs in place of models (trl 1.16)."""
    config = DpoConfig(**options)
    lengths = [(5, 3), (2, 7), (6, 6)]
    batch, log_probs = make_pairs(lengths, seed=7, dtype=torch.float32)
    batch.mask, batch.denominator = torch.ones_like(batch.mask), 3.0
    ours = Dpo(config).loss(batch, log_probs)
    theirs, metrics = trl_loss(config, name, batch, log_probs, lengths)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(loss, log_probs)[0] for loss in (ours.loss, theirs)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-6)
    if name in ("sigmoid", "hinge"):  # TRL's rewards are of sums, also where its loss takes means
        for own, other in (("accuracy", "accuracies"), ("margin", "margins"), ("rewards_chosen", "chosen")):
            assert float(ours.shares[own]) == pytest.approx(metrics[f"rewards/{other}"][0], abs=1e-5)


def trl_loss(
    config: DpoConfig, name: str, batch: TokenBatch, log_probs: torch.Tensor, lengths: list[tuple[int, int]]
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """TRL's loss and metrics. Its batch is padded: all that was chosen, then all that was rejected."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    order = [2 * pair + side for side in (0, 1) for pair in range(len(lengths))]
    counts = [pair[side] for side in (0, 1) for pair in lengths]
    width = max(counts) + 1
    mask = (torch.arange(width)[None] <= torch.tensor(counts)[:, None]).long()
    mask[:, 0] = 0

    def model(values: torch.Tensor) -> Any:
        own = [values[batch.sequence == s] for s in order]
        rows = torch.stack([torch.cat([one, one.new_zeros(width - 1 - len(one))]) for one in own])
        zeros = torch.zeros_like(rows)
        other = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return lambda **_: SimpleNamespace(log_probs=rows, **other)

    built = torch.nn.Identity()
    built.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=built,
        ref_model=model(batch.reference_log_probs),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=config.beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model(log_probs), inputs, False)
    return loss, trainer._metrics["train"]
