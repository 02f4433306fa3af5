"""What a recipe may say of an algorithm."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from hpc_rl.algorithms.advantages import ESTIMATORS
from hpc_rl.algorithms.config import GrpoConfig, RlConfig
from hpc_rl.algorithms.denominators import AGGREGATIONS
from hpc_rl.recipe.extensions import registry
from hpc_rl.recipe.yaml_source import RecipeError

RL = sorted(set(registry("algorithms").names()) - {"sft", "dpo"})


def config(name: str, **options: Any) -> RlConfig:
    found: RlConfig = registry("algorithms").config(name, options)
    return found


def test_top_p_is_refused_because_the_ratio_would_be_biased() -> None:
    assert GrpoConfig().top_p == 1.0
    with pytest.raises(ValidationError, match=r"must be 1\.0: engines renormalise"):
        GrpoConfig(top_p=0.95)


def test_grpo_keeps_its_defaults() -> None:
    expected = {
        "group_size": 8, "temperature": 1.0, "top_p": 1.0, "clip_low": 0.2, "clip_high": 0.2, "kl_beta": 0.0,
        "max_staleness": 2, "proximal": "sampler", "loss_aggregation": "token_mean", "normalize_std": True,
    }  # fmt: skip
    found = config("grpo").model_dump()
    assert {key: found[key] for key in expected} == expected
    assert (found["correction"]["kind"], found["correction"]["cap"]) == ("tis", 2.0)


@pytest.mark.parametrize("name", RL)
def test_defaults_correct_what_is_off_policy_and_name_what_there_is(name: str) -> None:
    found = config(name)
    assert found.max_staleness > 0
    assert found.correction.kind != "none"
    assert found.advantage in ESTIMATORS
    assert found.loss_aggregation in AGGREGATIONS
    assert config(name, **found.model_dump(mode="json")) == found, "resolved.yaml says every default"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("gspo", {"loss_aggregation": "token_mean"}, "is \"token_mean\"; must be sequence_mean: the ratio"),
        ("dr_grpo", {"loss_aggregation": "token_mean"}, "allowed: 'constant_length'"),
        ("grpo", {"correction": {"kind": "none"}}, "correction.kind none needs proximal: recompute"),
        ("aipo", {"proximal": "recompute"}, "proximal: is \"recompute\"; allowed: 'sampler'"),
        ("cispo", {"correction": {"kind": "none"}}, "correction.kind none needs proximal: recompute"),
        ("rloo", {"correction": {"cap": 3.0}}, "correction.cap does nothing with proximal: sampler"),
        ("grpo", {"correction": {"low": 0.5}}, "low and high belong to kind icepop and sequence_mask"),
        ("grpo", {"correction": {"kind": "icepop", "high": 0.4}}, "low 0.5 must be less than high 0.4"),
        ("dapo", {"loss_length": 100}, "loss_length belongs to loss_aggregation: constant_length"),
        ("rloo", {"group_size": 1}, "group_size: is 1; must be at least 2: an answer's advantage is against"),
        ("reinforce_pp", {"drop_zero_variance": True}, "drop_zero_variance needs group_size of 2 or more"),
        ("maxrl", {"kl_beta": 0.1, "kl_estimator": "k1"}, "kl_estimator must not be k1 in the loss"),
        ("grpo", {"kl_in": "reward", "kl_estimator": "k3_k2"}, "k3_k2 differs from k3 in its gradient"),
        ("maxrl", {"kl_in": "reward"}, "kl_in must be loss with maxrl"),
        ("grpo", {"top_k": 50}, "top_k must be left out: engines renormalise"),
        ("gspo", {"min_p": 0.1}, "min_p must be left out: engines renormalise"),
        ("dapo", {"top_p": 0.9}, "must be 1.0: engines renormalise"),
    ],
)  # fmt: skip
def test_wrong_combinations_are_refused_with_key_and_reason(
    name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        config(name, **options)
    assert says in str(caught.value)
