"""The entropy's gradient, in both heads, and the bonus in the loss. fp64, against autograd of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpc_rl.algorithms import chunked_head as module
from hpc_rl.algorithms import log_probs as blocks
from hpc_rl.algorithms.base import TokenBatch, loss_denominator
from hpc_rl.algorithms.chunked_head import Head, chunked_log_probs
from hpc_rl.algorithms.core import PolicyGradient
from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.recipe.extensions import registry
from tests.algorithms.batches import make_batch, split
from tests.algorithms.test_chunked_head import HEADS, N, V, case, logits_of, set_rows
from tests.algorithms.written import CASES

torch.set_num_threads(1)


def written(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    z = torch.log_softmax(logits / temperature, -1)
    return z.gather(1, targets[:, None]).squeeze(1), -(z.exp() * z).sum(-1)


def mixed(log_probs: Tensor, entropy: Tensor | None, which: str) -> Tensor:
    """A loss that is linear in neither."""
    assert entropy is not None
    weights = torch.linspace(-1.0, 2.0, len(log_probs), dtype=log_probs.dtype)
    ours = (weights * log_probs.exp()).sum() if which != "entropy" else 0.0
    return ours + ((weights - 0.3) * entropy.square()).sum()


@pytest.mark.parametrize("which", ["entropy", "both"])
@pytest.mark.parametrize(("block", "temperature"), [(1, 1.0), (4 * V, 0.7), (1 << 18, 1.4)])
def test_from_logits(which: str, block: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(blocks.BLOCK_ELEMENTS, "cpu", block)
    torch.manual_seed(1)
    logits = (torch.randn(N, V, dtype=torch.float64) * 3).requires_grad_()
    targets = torch.randint(V, (N,))
    loss = mixed(*token_log_probs(logits, targets, temperature, True), which)
    expected = mixed(*written(logits, targets, temperature), which)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("which", ["entropy", "both"])
@pytest.mark.parametrize(("rows", "temperature"), [(1, 1.0), (5, 0.7)])
def test_in_chunks(
    kind: str, which: str, rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rows(monkeypatch, rows)
    hidden, weight, offset, targets = case()
    head, inputs = Head(weight, offset, **HEADS[kind]), [hidden, weight, offset]
    loss = mixed(*chunked_log_probs(hidden, head, targets, temperature, True), which)
    expected = mixed(*written(logits_of(hidden, head), targets, temperature), which)
    ours, theirs = (torch.autograd.grad(value, inputs) for value in (loss, expected))
    for gradient, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_bf16_logits_are_as_exact_as_the_rounding_of_the_gradient() -> None:
    torch.manual_seed(2)
    logits = torch.randn(N, V, dtype=torch.float64).bfloat16()
    targets, found = torch.randint(V, (N,)), []
    for own in (logits.requires_grad_(), logits.detach().double().requires_grad_()):
        found.append(torch.autograd.grad(mixed(*token_log_probs(own, targets, 1.0, True), "both"), own)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=2**-8, atol=1e-6)


def test_gradients_made_in_the_forward_are_of_log_probs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, 4)
    hidden, weight, offset, targets = case()
    weights = torch.ones(N, dtype=torch.float64)
    log_probs, entropy = chunked_log_probs(
        hidden, Head(weight, offset), targets, with_entropy=True, weights=weights
    )
    assert entropy is not None
    with pytest.raises(RuntimeError, match="of the log-probs alone"):
        (log_probs.sum() + entropy.sum()).backward()


def test_an_entropy_that_is_only_measured_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is not asked for, so nothing is made for it."""
    made: list[Any] = []
    monkeypatch.setattr(module, "entropy_slope", lambda p: made.append(p))
    set_rows(monkeypatch, 4)
    hidden, weight, offset, targets = case()
    log_probs, _ = chunked_log_probs(hidden, Head(weight, offset), targets, with_entropy=True)
    log_probs.sum().backward()
    assert made == []


# --- the loss ------------------------------------------------------------------------------------------
ALGORITHMS = ["grpo", "dr_grpo", "gspo", "cispo", "rloo"]
BETA = 0.03


def with_bonus(name: str, beta: float) -> PolicyGradient:
    options = dict(CASES[name][1]) | {"entropy_beta": beta}
    found: PolicyGradient = registry("algorithms").load(name)(registry("algorithms").config(name, options))
    return found


def prepared(name: str, lengths: list[int]) -> tuple[TokenBatch, Tensor, Tensor]:
    """A batch with its denominator, log-probs and entropies that have gradients."""
    config = with_bonus(name, BETA).config
    batch, log_probs = make_batch(lengths, seed=3)
    batch.denominator = loss_denominator([batch], config.loss_aggregation, config.loss_length)
    entropy = torch.linspace(0.1, 3.0, len(log_probs), dtype=torch.float64).requires_grad_()
    return batch, log_probs, entropy


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_bonus_is_the_aggregated_entropy(name: str) -> None:
    batch, log_probs, entropy = prepared(name, [5, 1, 7, 3])
    plain = with_bonus(name, 0.0).loss(batch, log_probs, entropy.detach())
    found = with_bonus(name, BETA).loss(batch, log_probs, entropy)
    by_log_probs, by_entropy = torch.autograd.grad(found.loss, [log_probs, entropy])
    torch.testing.assert_close(by_log_probs, torch.autograd.grad(plain.loss, log_probs)[0])
    mask = batch.mask
    if name == "gspo":  # a mean over each answer's tokens
        counts = torch.zeros(4, dtype=torch.float64).index_add_(0, batch.sequence, mask)
        mask = mask / counts.clamp(min=1)[batch.sequence]
    torch.testing.assert_close(by_entropy, -BETA * mask / batch.denominator)
    bonus = (by_entropy * entropy).sum().detach()
    torch.testing.assert_close(found.loss - plain.loss, bonus)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_its_gradient_does_not_depend_on_the_split(name: str) -> None:
    batch, log_probs, entropy = prepared(name, [5, 1, 7, 3, 2])
    one = with_bonus(name, BETA)
    (expected,) = torch.autograd.grad(one.loss(batch, log_probs, entropy).loss, entropy)
    total = torch.zeros_like(entropy)
    for micro, index in split(batch, [[3, 0], [], [4, 1, 2]]):
        micro.denominator = batch.denominator
        total += torch.autograd.grad(one.loss(micro, log_probs[index], entropy[index]).loss, entropy)[0]
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-15)


def test_what_is_masked_has_none_even_if_it_is_not_finite() -> None:
    batch, log_probs, entropy = prepared("grpo", [4, 2])
    batch.mask[:2], batch.mask[2] = 0.0, 1.0
    batch.sampler_log_probs[2] = float("nan")
    with torch.no_grad():
        entropy[:3] = float("nan")
    found = with_bonus("grpo", BETA).loss(batch, log_probs, entropy)
    (gradient,) = torch.autograd.grad(found.loss, entropy)
    assert torch.isfinite(found.loss)
    assert gradient[:3].tolist() == [0.0, 0.0, 0.0]
