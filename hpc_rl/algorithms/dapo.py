"""DAPO (Yu et al. 2025, arXiv:2503.14476): GRPO with four changes.

    clip-higher       clip(r, 1 - 0.2, 1 + 0.28): unlikely tokens may grow
    token-level loss  a mean over all tokens of the step, not over answers
    dynamic sampling  groups with equal rewards leave the step before anything is counted
    overlong shaping  rewards fall linearly over the last `overlong_buffer` tokens before the limit

The first two are this loss, the others the controller's (`controller/batch.py`). The paper refills the batch;
here a step's prompts are fixed, so it is smaller by the groups that left.
"""

from __future__ import annotations

from hpc_rl.algorithms.grpo import Grpo


class Dapo(Grpo):
    """`Algorithm` of that name: GRPO's surrogate with DAPO's config."""
