"""`python -m hpc_rl.scoring.reward RUN_DIR --attempt N --incarnation I --replica K`: serves model rewards."""

from __future__ import annotations

import sys

from hpc_rl.recipe.extensions import is_served, registry
from hpc_rl.rewards.base import reward_specs
from hpc_rl.roles import RoleProcess, main
from hpc_rl.scoring.base import ServedReward, begin
from hpc_rl.scoring.rewards import RewardWork
from hpc_rl.scoring.server import Server


def body(process: RoleProcess) -> int:
    """Load every model of the group, then answer until told to stop."""
    sections = process.recipe.reward
    specs = [spec for spec, item in zip(reward_specs(sections), sections, strict=True) if is_served(item)]
    begin(process)
    process.register(rewards=", ".join(spec.key for spec in specs))
    members = registry("rewards")
    rewards: dict[str, ServedReward] = {}
    for spec in specs:
        config = members.config(spec.name, dict(spec.options))
        rewards[spec.key] = members.load(spec.name)(config)
    Server(process, RewardWork(rewards), limit_s=sum(spec.limit_s for spec in specs)).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main("reward", body))
