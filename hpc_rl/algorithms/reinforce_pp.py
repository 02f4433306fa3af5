"""REINFORCE++ and its -baseline variant (Hu et al. 2025, arXiv:2501.03262): PPO's clip without a critic.

    reinforce_pp            A = (R - mean(R)) / std(R)      over the whole batch: one answer a prompt will do
    reinforce_pp_baseline   A = (R - mean_group(R)) / std   the std of these, over the whole batch

The loss is GRPO's. Each answer counts once in mean and deviation, whatever its length. The paper's KL
reward is `kl_in: reward` (`policy/penalised_rewards.py`).
"""

from __future__ import annotations

from hpc_rl.algorithms.grpo import Grpo


class ReinforcePp(Grpo):
    """`Algorithm` of both names: GRPO's surrogate; the advantages are the config's."""
