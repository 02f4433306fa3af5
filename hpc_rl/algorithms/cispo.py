"""CISPO (MiniMax-M1, arXiv:2506.13585): the weight is truncated, not the update.

    loss = -sum over tokens of sg(min(r, is_cap)) A l / tokens

PPO's clip takes the gradient from tokens that changed most, often the rare ones that begin a new thought;
here each keeps one. `is_cap` bounds the ratio itself (the same place is 1 + epsilon in some systems).
"""

from __future__ import annotations

from hpc_rl.algorithms.config import Truncation
from hpc_rl.algorithms.core import PolicyGradient, Surrogate, Tokens, token_ratio, truncated


class Cispo(PolicyGradient):
    """`Algorithm` of that name, and of all that differ from it in their config alone."""

    config: Truncation

    def __init__(self, config: Truncation) -> None:
        super().__init__(config)

    def surrogate(self, tokens: Tokens) -> Surrogate:
        return truncated(tokens, token_ratio(tokens), self.config.is_cap)
