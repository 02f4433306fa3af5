"""Token log-probs against log_softmax in fp64: values, gradients, entropy, and any block size."""

from __future__ import annotations

import pytest
import torch

from hpc_rl.algorithms import log_probs as module
from hpc_rl.algorithms.log_probs import token_log_probs

torch.set_num_threads(1)


def reference(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    table = torch.log_softmax(logits.double() / temperature, dim=-1)
    return table.gather(1, targets[:, None]).squeeze(1), -(table.exp() * table).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block", [1, 64, 1 << 22])
def test_values_gradient_and_entropy(temperature: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", {"cpu": block})
    torch.manual_seed(0)
    logits = (torch.randn(17, 33, dtype=torch.float64) * 4).requires_grad_()
    targets = torch.randint(33, (17,))
    ours, entropy = token_log_probs(logits, targets, temperature, with_entropy=True)
    expected, expected_entropy = reference(logits, targets, temperature)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    weight = torch.randn(17, dtype=torch.float64)
    (grad,) = torch.autograd.grad((ours * weight).sum(), logits)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), logits)
    torch.testing.assert_close(grad, expected_grad)


def test_gradcheck() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda z: token_log_probs(z, targets, 1.3)[0], (logits,))


def test_bf16_logits_are_widened_before_the_softmax() -> None:
    torch.manual_seed(2)
    logits = (torch.randn(64, 1000) * 5).bfloat16()
    targets = torch.randint(1000, (64,))
    ours, _ = token_log_probs(logits, targets)
    expected, _ = reference(logits, targets, 1.0)
    assert ours.dtype == torch.float32
    assert (ours.double() - expected).abs().max() < 1e-5
    naive = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    assert (naive.double() - expected).abs().max() > 1e-3  # what this function is for


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_of_bf16_logits_is_rounded_once(temperature: float) -> None:
    torch.manual_seed(3)
    logits = (torch.randn(64, 1000) * 5).bfloat16().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    targets, weight = torch.randint(1000, (64,)), torch.randn(64)
    (ours,) = torch.autograd.grad((token_log_probs(logits, targets, temperature)[0] * weight).sum(), logits)
    (expected,) = torch.autograd.grad((reference(exact, targets, temperature)[0] * weight).sum(), exact)
    assert ours.dtype == torch.bfloat16
    # bf16's unit roundoff (8 bits of precision), and fp32's own error.
    assert ((ours.double() - expected).abs() <= 2.0**-8 * 1.01 * expected.abs() + 1e-6).all()


def test_huge_and_forbidden_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, float("-inf"), 1.0]])
    ours, entropy = token_log_probs(logits, torch.tensor([0, 2]), with_entropy=True)
    expected, _ = reference(logits, torch.tensor([0, 2]), 1.0)
    torch.testing.assert_close(ours, expected.float())
    assert torch.isfinite(entropy).all()
    with pytest.raises(ValueError, match="temperature"):
        token_log_probs(logits, torch.tensor([0, 2]), 0.0)
