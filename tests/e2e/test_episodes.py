"""A whole run whose answers are episodes of two turns, with a plugin's environment and credit of turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e import tiny
from tests.e2e.harness import Run

pytestmark = [pytest.mark.torch, pytest.mark.redis, pytest.mark.slow]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def test_episodes_train_on_what_the_policy_wrote(workspace: Path) -> None:
    """The learner's log-probs of both turns are the sampler's: the sequence is the same, token for token."""
    config = workspace / "model" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    plugins = [str(Path(__file__).with_name(name)) for name in ("digits_reward.py", "asking_plugin.py")]
    # Every letter ends a turn, so that a model with random weights comes to a second one.
    recipe = tiny.rl_recipe(
        workspace,
        plugins=plugins,
        simulator={"name": "asking", "max_turn_tokens": 24, "credit": "turn"},
        algorithm={"name": "grpo", "group_size": 4, "max_staleness": 0},
        rollout={"engine": "hf", "replicas": 1, "max_tokens": 64, "stop": list("abcdefghij")},
        policy={"steps": 2, "micro_batch_tokens": 512},
        checkpoint={"enabled": False, "export": "off"},
    )
    run = Run.submit(recipe)
    run.complete(240)
    rows = [row for row in run.metrics() if row["step"] > 0]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 1.0 < row["rollout/turns"] <= 2.0
        assert row["rollout/asked"] == row["rollout/turns"]
        assert row["reward/simulator"] > 0
        assert row["train/mismatch_mean"] < 1e-6
        assert row["train/mismatch_max"] < 1e-5
