"""Floating-point operations of a training step, from a model's `config.json`.

Model FLOPs as in PaLM (arXiv 2204.02311, appendix B): per token 6 N for the N parameters that it is
multiplied with (2 forward, 4 backward), and per layer 12 H Q s for attention over s positions (H heads of
size Q, softmax(Q K^T) V, causal or not). Summed over a packed row of sequences s_i, the second term is
12 L H Q sum(s_i^2). Recomputation under activation checkpointing is not counted.

Deviations, all towards what is really computed: the output head is counted for the positions that are
trained only (it runs on no other), a mixture of experts with the experts that a token goes to, and a
frozen share f of the weights with 4 instead of 6 (no weight gradient). Norms, biases, the embedding
look-up and a vision tower are not counted, so a VLM's figure is a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")


@dataclass(frozen=True)
class ModelFlops:
    """`body` and `head` are active parameters, `attention` is L H Q; all of the language model."""

    body: int
    head: int
    attention: int

    @property
    def pair_cost(self) -> float:
        """What attention between a token and each position costs over what the token's parameters cost: a
        sequence of L tokens takes L + pair_cost L^2 times a token's work."""
        return 2.0 * self.attention / (self.body + self.head)

    def step(self, tokens: float, trained: float, squares: float, trained_share: float = 1.0) -> float:
        """FLOPs of forward and backward over `tokens` positions, `trained` of them with a loss, in
        sequences whose squared lengths add up to `squares`."""
        per_parameter = 4.0 + 2.0 * trained_share
        return per_parameter * (self.body * tokens + self.head * trained) + 12.0 * self.attention * squares


def model_flops(config: dict[str, Any]) -> ModelFlops | None:
    """By a `config.json`; None where it does not have the sizes of a decoder of attention and MLP."""
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config

    def size(*names: str) -> int | None:
        return next((text[n] for n in names if isinstance(text.get(n), int) and text[n] > 0), None)

    hidden, layers, vocab = (
        size("hidden_size", "n_embd"),
        size("num_hidden_layers", "n_layer"),
        size("vocab_size"),
    )
    heads, inner = size("num_attention_heads", "n_head"), size("intermediate_size", "n_inner")
    if not (hidden and layers and vocab and heads):
        return None
    head_dim = size("head_dim") or hidden // heads
    kv_heads = size("num_key_value_heads") or heads
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads)
    experts, active = size(*_EXPERTS), size(*_ACTIVE)
    if experts and experts > 1 and active:
        expert_inner = size("moe_intermediate_size") or inner
        shared = size("shared_expert_intermediate_size") or 0
        if expert_inner is None:
            return None
        mlp = 3 * hidden * (active * expert_inner + shared) + hidden * experts
    else:
        # GPT-2 kin have two matrices of four times the width, the others a gate as well.
        plain = "n_embd" in text
        mlp = (2 if plain else 3) * hidden * (inner or (4 * hidden if plain else 0))
    if mlp == 0:
        return None
    return ModelFlops(layers * (projections + mlp), hidden * vocab, layers * heads * head_dim)
