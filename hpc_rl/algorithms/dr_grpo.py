"""Dr. GRPO (Liu et al. 2025, arXiv:2503.20783): GRPO without the two divisions that bias it.

    A = R - mean(R)               no standard deviation: easy and hard prompts count alike
    loss = -sum over tokens of clipped(r) / (sequences * loss_length)
                                  no length of its own: long wrong answers are not let off

`loss_length` is a constant (`rollout.max_tokens` unless the recipe says another), so that a token counts the
same in every batch.
"""

from __future__ import annotations

from hpc_rl.algorithms.grpo import Grpo


class DrGrpo(Grpo):
    """`Algorithm` of that name: GRPO with `loss_aggregation: constant_length` and advantages `group_mean`."""
