"""Gradients made in the forward for losses of single tokens: those of any loss, or refused beforehand."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from hpc_rl.algorithms.base import TokenBatch, loss_denominator
from hpc_rl.algorithms.chunked_head import Head, TokenLoss, chunked_log_probs
from hpc_rl.algorithms.core import PolicyGradient
from hpc_rl.recipe.extensions import registry
from tests.algorithms.batches import make_batch
from tests.algorithms.test_chunked_head import set_rows
from tests.algorithms.written import CASES

torch.set_num_threads(1)
LENGTHS, WIDTH, WORDS = [5, 1, 7, 3], 8, 33
# What looks at whole answers: their mean ratio, their number of tokens, their mean distance to the sampler.
OF_ANSWERS = {"gspo", "grpo, sequence_mean", "grpo, sequence mask", "grpo, off-policy mask"}


def algorithm(case: str) -> PolicyGradient:
    name, options, _ = CASES[case]
    found: PolicyGradient = registry("algorithms").load(name)(registry("algorithms").config(name, options))
    return found


def make(case: str) -> tuple[TokenBatch, Tensor, Tensor]:
    """A batch whose sampler was near the model, hidden states and a weight."""
    torch.manual_seed(0)
    batch, _ = make_batch(LENGTHS, seed=1)
    n = len(batch.mask)
    batch.targets = torch.randint(WORDS, (n,))
    hidden = torch.randn(n, WIDTH, dtype=torch.float64).requires_grad_()
    weight = torch.randn(WORDS, WIDTH, dtype=torch.float64).requires_grad_()
    with torch.no_grad():
        near, _ = chunked_log_probs(hidden, Head(weight), batch.targets)
    noise = torch.randn(2, n, dtype=torch.float64)
    batch.sampler_log_probs, batch.reference_log_probs = near + 0.4 * noise[0], near + 0.3 * noise[1]
    batch.sampler_log_probs[4] = float("nan")
    config = algorithm(case).config
    batch.denominator = loss_denominator([batch], config.loss_aggregation, config.loss_length)
    return batch, hidden, weight


@pytest.mark.parametrize("case", sorted(set(CASES) - OF_ANSWERS))
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_gradient_is_that_of_any_loss(case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, rows)
    one = algorithm(case)
    assert isinstance(one, TokenLoss)
    assert one.token_level
    found = []
    for known in (True, False):
        batch, hidden, weight = make(case)
        weights = functools.partial(one.token_gradient, batch) if known else None
        log_probs, entropy = chunked_log_probs(
            hidden, Head(weight), batch.targets, 0.9, with_entropy=True, weights=weights
        )
        loss = one.loss(batch, log_probs, entropy).loss
        found.append((loss.detach(), *torch.autograd.grad(loss * 3.0, [hidden, weight])))
    assert found[0][2].abs().max() > 0
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", sorted(OF_ANSWERS))
def test_what_looks_at_whole_answers_says_so(case: str) -> None:
    assert not algorithm(case).token_level


def test_an_entropy_bonus_takes_the_second_pass() -> None:
    config = registry("algorithms").config("grpo", {"entropy_beta": 0.01})
    assert not registry("algorithms").load("grpo")(config).token_level


def test_a_loss_that_says_so_wrongly_is_not_finite_rather_than_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, 4)
    one = algorithm("gspo")
    batch, hidden, weight = make("gspo")
    log_probs, _ = chunked_log_probs(
        hidden, Head(weight), batch.targets, weights=functools.partial(one.token_gradient, batch)
    )
    one.config = one.config.model_copy(update={"clip_low": 0.9, "clip_high": 9.0})
    (gradient,) = torch.autograd.grad(one.loss(batch, log_probs, None).loss, weight)
    assert gradient.isnan().all()
