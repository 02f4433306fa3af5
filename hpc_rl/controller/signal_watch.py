"""A word when nothing can be learned: group-relative advantages are all zero where all rewards are equal."""

from __future__ import annotations

from collections.abc import Mapping

PATIENCE = 5  # steps in a row; one such step is nothing special with few prompts


class SignalWatch:
    """Fed with each step's metrics; speaks once per stretch of steps without a signal."""

    def __init__(self) -> None:
        self._steps = 0

    def step(self, metrics: Mapping[str, float]) -> str | None:
        """The warning, when `PATIENCE` steps in a row had no prompt group with different rewards."""
        silent = metrics.get("rollout/zero_variance_groups") == 1.0
        self._steps = self._steps + 1 if silent else 0
        if self._steps != PATIENCE:
            return None
        reward = metrics.get("rollout/reward_mean", float("nan"))
        return (
            f"{PATIENCE} steps in a row all answers to a prompt had the same reward (mean {reward:.3f}): the "
            "advantages are zero and nothing is learned; look at the model, the reward and the answers"
        )
