"""The same loss and gradient as TRL's GRPOTrainer, where its names mean the same (trl 1.16).

Its `_compute_loss` is called on a trainer that was never built: it is given log-probs [B, T] instead of a
model, and what it reads of its arguments. Padding is random, so that a token outside the mask would show.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc_rl.algorithms.base import TokenBatch, loss_denominator
from hpc_rl.recipe.extensions import registry
from tests.algorithms.batches import make_batch

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")
pytestmark = pytest.mark.slow
torch.set_num_threads(1)
LENGTHS, WIDTH, CAP = [5, 3, 7, 6], 7, 2.0


def trl_trainer(loss_type: str, low: float, high: float, **changes: Any) -> Any:
    """What `_compute_loss` reads of a trainer of one process without accumulation."""
    options: dict[str, Any] = {
        "loss_type": loss_type,
        "epsilon_low": low,
        "epsilon_high": high,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "get_off_policy_mask": grpo_trainer.GRPOTrainer.get_off_policy_mask,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "max_completion_length": WIDTH,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(delta=CAP, steps_per_generation=1, use_bias_correction_kl=False),
        "accelerator": SimpleNamespace(num_processes=1, reduce=lambda x, **_: x, gather=lambda x: x),
    }
    return SimpleNamespace(**options | changes)


def padded(batch: TokenBatch, values: torch.Tensor, fill: float | None = None) -> torch.Tensor:
    """[N] as [B, WIDTH]; what is beyond an answer is `fill`, or noise."""
    noise = torch.randn(len(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(5), dtype=values.dtype)
    rows = noise if fill is None else torch.full_like(noise, fill)
    place = torch.cat([torch.arange(n) for n in LENGTHS])
    return rows.index_put((batch.sequence, place), values)


def trl_loss(trainer: Any, batch: TokenBatch, log_probs: torch.Tensor, **inputs: Any) -> torch.Tensor:
    current = padded(batch, log_probs)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (current, torch.zeros_like(current), None)
    mask = padded(batch, batch.mask, 0.0).long()
    first = [int((batch.sequence == s).nonzero()[0]) for s in range(len(LENGTHS))]
    tokens = torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long)
    return grpo_trainer.GRPOTrainer._compute_loss(
        trainer,
        None,
        {
            "prompt_ids": tokens[:, :1],
            "prompt_mask": torch.ones_like(tokens[:, :1]),
            "completion_ids": tokens,
            "completion_mask": mask,
            "advantages": batch.advantages[first],
            "old_per_token_logps": padded(batch, batch.sampler_log_probs),
            "num_items_in_batch": mask.sum(),
            **inputs,
        },
    )


CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "grpo": ("grpo", {"loss_aggregation": "sequence_mean"}, ("grpo", 0.2, 0.2, {})),
    "grpo, token_mean": ("grpo", {}, ("dapo", 0.2, 0.2, {})),
    "dr_grpo": ("dr_grpo", {"loss_length": WIDTH}, ("dr_grpo", 0.2, 0.2, {})),
    "dapo": ("dapo", {}, ("dapo", 0.2, 0.28, {})),
    "gspo": ("gspo", {}, ("grpo", 3e-4, 4e-4, {"importance_sampling_level": "sequence"})),
    "cispo": ("cispo", {}, ("cispo", 0.2, 5.0, {})),
    "off-policy mask": (
        "dapo",
        {"off_policy_mask": 0.02},
        ("dapo", 0.2, 0.28, {"off_policy_mask_threshold": 0.02}),
    ),
}


def both(case: str, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    name, options, (loss_type, low, high, changes) = CASES[case]
    config = registry("algorithms").config(name, options)
    batch, log_probs = make_batch(LENGTHS, seed, noise=noise)
    batch.mask[[0, 5, 8, 15]] = 1.0  # every answer has a token: TRL also counts those without
    batch.denominator = loss_denominator([batch], config.loss_aggregation, config.loss_length)
    ours = registry("algorithms").load(name)(config).loss(batch, log_probs, None).loss
    return log_probs, ours, trl_loss(trl_trainer(loss_type, low, high, **changes), batch, log_probs)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.8])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_trl(case: str, noise: float) -> None:
    for seed in range(4):
        log_probs, ours, theirs = both(case, seed, noise)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        grads = [torch.autograd.grad(loss, log_probs)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-6)
        assert grads[0].abs().max() > 1e-3 or case == "gspo"  # whose clip may leave nothing


def test_truncated_importance_sampling_is_that_of_trl() -> None:
    """Its `importance_sampling_ratio`, clamped at the same cap; old log-probs are those of the trainer."""
    config = registry("algorithms").config("dapo", {"proximal": "recompute"})
    batch, log_probs = make_batch(LENGTHS, 3, noise=0.8)
    batch.denominator = loss_denominator([batch], "token_mean")
    ours = registry("algorithms").load("dapo")(config).loss(batch, log_probs, None).loss
    trainer = trl_trainer("dapo", 0.2, 0.28, use_vllm=True, vllm_importance_sampling_correction=True)
    start = padded(batch, log_probs).detach()
    ratio = torch.exp(start - padded(batch, batch.sampler_log_probs, 0.0)).clamp(max=CAP)
    theirs = trl_loss(trainer, batch, log_probs, old_per_token_logps=start, importance_sampling_ratio=ratio)
    grads = [torch.autograd.grad(loss, log_probs)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-6)
