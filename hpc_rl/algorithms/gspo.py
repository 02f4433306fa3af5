"""GSPO (Zheng et al. 2025, arXiv:2507.18071): the ratio, the clip and the mean are of whole sequences.

    s = exp(mean over the answer's tokens of l - p)
    loss = -mean over answers of min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A)

Written token by token as s_t = sg(s) exp(l_t - sg(l_t)), with the same value and gradient.
"""

from __future__ import annotations

from hpc_rl.algorithms.core import Surrogate, Tokens, clipped, sequence_ratio
from hpc_rl.algorithms.grpo import Grpo


class Gspo(Grpo):
    """`Algorithm` of that name: GRPO's clip of the sequence's ratio."""

    token_level = False  # whatever the options: the ratio is one of the answer

    def surrogate(self, tokens: Tokens) -> Surrogate:
        options = self.config
        return clipped(tokens, sequence_ratio(tokens), options.clip_low, options.clip_high, options.floor)
