"""MaxRL (arXiv:2602.02710): towards maximum likelihood of success instead of its mean.

    A = (R - mean(R)) / mean(R)      within the prompt group, for rewards that are not negative

The rarer a prompt's successes, the more each counts: with rewards 0 and 1 the group's gradient is, but for a
baseline, the mean over its successes alone. The loss is GRPO's.
"""

from __future__ import annotations

from hpc_rl.algorithms.grpo import Grpo


class MaxRl(Grpo):
    """`Algorithm` of that name: GRPO's surrogate with advantages `maxrl`."""
