"""RLOO (Ahmadian et al. 2024, arXiv:2402.14740): REINFORCE with a leave-one-out baseline.

    A_i = R_i - mean of the other answers' R
    loss = -mean over answers of A_i * (sum over tokens of w l),   w = sg(min(exp(l - m), is_cap))

On-policy w = 1, the paper's estimator; w corrects what staleness and the sampler's numerics change.
"""

from __future__ import annotations

from hpc_rl.algorithms.cispo import Cispo


class Rloo(Cispo):
    """`Algorithm` of that name: a truncated weight, summed over each answer, with advantages `rloo`."""
