"""The head in chunks against logits of all rows: values, gradients, entropy, memory, and its refusals.

Tolerances: fp64 against fp64 as `assert_close` has them (1e-7 relative), fp32 against fp32 1e-6.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_rl.algorithms import chunked_head as module
from hpc_rl.algorithms.base import TokenBatch
from hpc_rl.algorithms.chunked_head import Head, WeightedSum, chunked_log_probs
from hpc_rl.algorithms.log_probs import token_log_probs
from hpc_rl.algorithms.sft import Sft

torch.set_num_threads(1)
N, H, V = 17, 8, 33


def case(
    dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, dtype=dtype).requires_grad_()
    weight = (torch.randn(V, H, dtype=dtype) * 2).requires_grad_()
    offset = torch.randn(V, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(V, (N,))


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


def set_rows(monkeypatch: pytest.MonkeyPatch, rows: int, vocabulary: int = V) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": rows * vocabulary})


HEADS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"soft_cap": 3.0},
    "both": {"scale": 2.0, "soft_cap": 5.0},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(("rows", "temperature", "bias"), [(1, 1.0, False), (5, 0.7, True), (64, 1.3, True)])
def test_values_gradients_and_entropy(
    kind: str, known: bool, rows: int, temperature: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_rows(monkeypatch, rows)
    hidden, weight, offset, targets = case(bias=bias)
    head = Head(weight, offset, **HEADS[kind])
    weights = torch.randn(N, dtype=torch.float64)
    weights[3] = 0.0
    expected = torch.log_softmax(logits_of(hidden, head) / temperature, -1)
    ours, entropy = chunked_log_probs(
        hidden, head, targets, temperature, with_entropy=True, weights=weights if known else None
    )
    taken = expected.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(ours, taken)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1).detach())
    inputs = [t for t in (hidden, weight, offset) if t is not None]
    gradients = torch.autograd.grad((ours * weights).sum() * -3.0, inputs)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad((taken * weights).sum() * -3.0, inputs), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("kind", HEADS)
def test_gradcheck(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, 3)
    hidden, weight, offset, targets = case()

    def run(hidden: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        return chunked_log_probs(hidden, Head(weight, offset, **HEADS[kind]), targets, 1.3)[0]

    assert torch.autograd.gradcheck(run, (hidden, weight, offset))


@pytest.mark.parametrize("known", [False, True])
def test_a_loss_that_is_not_linear(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right without weights; with weights that are not its own, not finite rather than wrong."""
    set_rows(monkeypatch, 4)
    hidden, weight, offset, targets = case()
    head = Head(weight, offset)
    weights = torch.linspace(0.5, 1.0, N, dtype=torch.float64)
    ours, _ = chunked_log_probs(hidden, head, targets, weights=weights if known else None)
    gradient = torch.autograd.grad((ours.exp() * weights).sum(), weight)[0]
    if known:
        assert gradient.isnan().all()
    else:
        taken = token_log_probs(logits_of(hidden, head), targets)[0]
        torch.testing.assert_close(gradient, torch.autograd.grad((taken.exp() * weights).sum(), weight)[0])


@pytest.mark.parametrize("known", [False, True])
def test_fp32_is_that_of_the_logits(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, 6)
    hidden, weight, _, targets = case(torch.float32, bias=False)
    weights = torch.rand(N) / N
    ours, _ = chunked_log_probs(hidden, Head(weight), targets, weights=weights if known else None)
    expected, _ = token_log_probs(hidden @ weight.t(), targets)
    assert abs(float(((ours - expected) * weights).detach().sum())) <= 1e-6
    gradients = torch.autograd.grad((ours * weights).sum(), (hidden, weight))
    for gradient, wanted in zip(
        gradients, torch.autograd.grad((expected * weights).sum(), (hidden, weight)), strict=True
    ):
        assert float((gradient - wanted).abs().max()) <= 1e-6


@pytest.mark.parametrize("known", [False, True])
def test_the_weight_s_gradient_is_summed_in_fp32(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 chunks that all add to the same entries: a sum in bf16 stops growing after some hundreds."""
    set_rows(monkeypatch, 1, 4)
    rows = 4096
    hidden = torch.full((rows, 2), 0.5, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.full((rows,), 1 / rows)
    targets = torch.zeros(rows, dtype=torch.long)
    ours, _ = chunked_log_probs(hidden, Head(weight), targets, weights=weights if known else None)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), weight)
    assert gradient.dtype == torch.bfloat16
    expected = torch.tensor([[0.375], [-0.125], [-0.125], [-0.125]]).expand(4, 2)  # 0.5 * (onehot - 1/4)
    assert float((gradient.float() - expected).abs().max()) <= 2.0**-8 * 0.375


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("known", [False, True])
def test_nothing_is_larger_than_a_chunk_or_the_weight(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hidden_size, vocabulary = 512, 4, 64
    set_rows(monkeypatch, 16, vocabulary)
    torch.manual_seed(1)
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    targets, weights = torch.randint(vocabulary, (rows,)), torch.rand(rows)
    with Largest() as seen:
        ours, _ = chunked_log_probs(
            hidden, Head(weight), targets, with_entropy=True, weights=weights if known else None
        )
        (ours * weights).sum().backward()
    assert seen.elements == rows * hidden_size, "the gradient of hidden; a chunk has half of that"
    with Largest() as seen:
        token_log_probs(hidden @ weight.t(), targets)[0].sum().backward()
    assert seen.elements == rows * vocabulary, "what the test would see otherwise"


@pytest.mark.parametrize("known", [False, True])
def test_what_is_frozen_gets_no_gradient(known: bool) -> None:
    hidden, weight, offset, targets = case()
    assert offset is not None
    weights = torch.rand(N, dtype=torch.float64)
    for trained in (hidden, weight, offset):
        for tensor in (hidden, weight, offset):
            tensor.grad = None
            tensor.requires_grad_(tensor is trained)
        head = Head(weight, offset)
        ours, _ = chunked_log_probs(hidden, head, targets, weights=weights if known else None)
        (ours * weights).sum().backward()
        expected, _ = token_log_probs(logits_of(hidden, head), targets)
        (wanted,) = torch.autograd.grad((expected * weights).sum(), trained)
        torch.testing.assert_close(trained.grad, wanted)
        assert all(t.grad is None for t in (hidden, weight, offset) if t is not trained)


def test_gradients_of_the_forward_are_used_once() -> None:
    hidden, weight, _, targets = case(bias=False)
    weights = torch.ones(N, dtype=torch.float64)
    loss = chunked_log_probs(hidden, Head(weight), targets, weights=weights)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_nothing_counts() -> None:
    """A micro-batch without a trained token: zeros, no NaN."""
    hidden, weight, _, targets = case(bias=False)
    ours, _ = chunked_log_probs(hidden, Head(weight), targets, weights=torch.zeros(N, dtype=torch.float64))
    (ours.sum() * 0.0).backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_without_gradients_and_odd_temperatures() -> None:
    hidden, weight, _, targets = case(bias=False)
    with torch.no_grad():
        ours, entropy = chunked_log_probs(hidden, Head(weight), targets, weights=torch.ones(N))
    assert not ours.requires_grad and entropy is None
    with pytest.raises(ValueError, match="temperature"):
        chunked_log_probs(hidden, Head(weight), targets, 0.0)


def test_huge_and_forbidden_logits() -> None:
    weight = torch.tensor([[1e4], [-1e4], [-math.inf]])
    hidden = torch.ones(2, 1)
    ours, entropy = chunked_log_probs(hidden, Head(weight), torch.tensor([0, 1]), with_entropy=True)
    assert ours.tolist() == [0.0, -2e4]
    assert entropy is not None and entropy.tolist() == [0.0, 0.0]


def test_chunks_are_even() -> None:
    cpu = torch.device("cpu")
    elements = module.CHUNK_ELEMENTS["cpu"]
    assert module.chunk_rows(10, elements // 4, cpu) == 4
    assert module.chunk_rows(9, elements // 4, cpu) == 3
    assert module.chunk_rows(3, elements // 4, cpu) == 3
    assert module.chunk_rows(3, elements * 2, cpu) == 1


def test_the_weights_of_sft_are_those_of_its_loss() -> None:
    """Its gradient by the log-probs is -weights, whatever the log-probs are."""
    algorithm = Sft()
    assert isinstance(algorithm, WeightedSum)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    batch = TokenBatch(torch.zeros(4, dtype=torch.long), mask, torch.zeros(4, dtype=torch.long), 1, 7.0)
    log_probs = (-torch.rand(4)).requires_grad_()
    (gradient,) = torch.autograd.grad(algorithm.loss(batch, log_probs).loss, log_probs)
    torch.testing.assert_close(gradient, -algorithm.log_prob_weights(batch))
