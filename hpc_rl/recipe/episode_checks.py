"""Checks of answers that are episodes of several turns (`simulator`)."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_rl.recipe.schema import Recipe
from hpc_rl.recipe.yaml_source import KeyPath

Found = Iterator[tuple[KeyPath, str]]


def check_episodes(recipe: Recipe) -> Found:
    """What an episode is scored by, and what does not go with turns."""
    simulator = recipe.simulator
    if simulator is None or recipe.kind != "rl":
        return
    tools = simulator.get("name") == "tools"
    given = any(simulator.get(key) for key in ("call_reward", "error_reward"))
    if tools and not recipe.reward and not given and recipe.algorithm.get("name") != "distill":
        text = "is empty, and simulator tools gives no reward of its own: add one such as {name: math}"
        yield ("reward",), text
    if tools:
        for which, spec in (("train", recipe.data.train), ("eval", recipe.data.eval)):
            if spec is not None and spec.chat is False:
                text = (
                    "is false; tools are called in a conversation, which needs the chat template: remove it"
                )
                yield ("data", which, "chat"), text
    limit, rollout = simulator.get("max_turn_tokens"), recipe.rollout
    if isinstance(limit, int) and rollout is not None and limit > rollout.max_tokens:
        text = f"is {limit}; must be at most rollout.max_tokens {rollout.max_tokens}, which bounds all turns"
        yield ("simulator", "max_turn_tokens"), text
    if simulator.get("credit") == "turn":
        if recipe.algorithm.get("kl_in") == "reward" and recipe.algorithm.get("kl_beta"):
            text = "is 'turn'; with algorithm.kl_in reward the policy makes the advantages, of trajectories"
            yield ("simulator", "credit"), text
        if tools and not given:
            text = (
                "is 'turn', and no turn earns anything: set call_reward or error_reward, or leave credit out"
            )
            yield ("simulator", "credit"), text
