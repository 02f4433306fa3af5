"""AIPO (LlamaRL, Wu et al. 2025, arXiv:2505.24034): asynchronous importance-weighted policy optimisation.

    loss = -sum over tokens of sg(min(exp(l - m), is_cap)) A l / tokens

CISPO whose ratio is always against the sampler: the weight is the whole off-policy correction.
"""

from __future__ import annotations

from hpc_rl.algorithms.cispo import Cispo


class Aipo(Cispo):
    """`Algorithm` of that name: CISPO's surrogate with `proximal: sampler` only."""
