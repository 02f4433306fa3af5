"""From groups to `TrainStep`s: masks before counts, every sample once, equal work for all ranks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_rl.controller.batch import (
    BatchOptions,
    PreparedStep,
    loss_denominator,
    make_samples,
    rollout_metrics,
    teaches,
    to_sample,
    train_steps,
)
from hpc_rl.types import Prompt, PromptGroup, Trajectory, VersionSpan


def trajectory(
    ordinal: int, sample: int, answer: int, reward: float = 0.0, version: int = 0, **changes
) -> Trajectory:  # type: ignore[no-untyped-def]
    fields = {
        "ordinal": ordinal,
        "sample": sample,
        "replica": 0,
        "prompt_ids": [5, 6, 7],
        "token_ids": list(range(10, 10 + answer)),
        "log_probs": [-0.5] * answer,
        "spans": [VersionSpan(version, 0, answer)],
        "finish": "stop",
        "reward": reward,
        "rewards": {"exact": reward},
    }
    return Trajectory(**{**fields, **changes})


def group(ordinal: int, rewards: list[float], answer: int = 4) -> PromptGroup:
    prompt = Prompt(ordinal=ordinal, epoch=0, row=ordinal, content="x")
    return PromptGroup(prompt, [trajectory(ordinal, i, answer, r) for i, r in enumerate(rewards)])


def options(ranks: int = 1, tokens: int = 64, **changes) -> BatchOptions:  # type: ignore[no-untyped-def]
    fields = {
        "data_parallel": ranks,
        "ranks_per_replica": 1,
        "micro_batch_tokens": tokens,
        "micro_batch_size": None,
        "aggregation": "token_mean",
    }
    return BatchOptions(**{**fields, **changes})


def test_a_token_without_a_finite_log_prob_leaves_mask_and_denominator() -> None:
    sample = to_sample(trajectory(0, 0, 3, log_probs=[-1.0, math.nan, -math.inf]), advantage=2.0)
    assert sample.loss_mask == [0, 0, 0, 1, 0, 0]
    assert sample.log_probs == [0, 0, 0, -1.0, 0, 0]
    assert sample.advantages == [0, 0, 0, 2.0, 0, 0]
    assert loss_denominator([sample], "token_mean") == 1


def test_sequences_without_tokens_do_not_count_as_sequences() -> None:
    samples = [to_sample(trajectory(0, i, n), 1.0) for i, n in enumerate([0, 2, 5])]
    assert loss_denominator(samples, "sequence_mean") == 2
    with pytest.raises(ValueError, match="token_mean, sequence_mean"):
        loss_denominator(samples, "mean")


def test_a_group_without_variance_has_no_advantage() -> None:
    flat, mixed = (
        make_samples([group(i, rewards)], options()) for i, rewards in enumerate(([1.0, 1.0], [1.0, 0.0]))
    )
    assert all(a == 0 for sample in flat for a in sample.advantages)
    assert mixed[0].advantages[-1] > 0 > mixed[1].advantages[-1]


def test_a_step_with_nothing_to_train_on_goes_to_every_rank_empty() -> None:
    samples = [to_sample(trajectory(0, 0, 2, log_probs=[math.nan, math.nan]), 1.0)]
    for commands in (train_steps(3, samples, options()), train_steps(3, [], options())):
        assert len(commands) == options().data_parallel * options().ranks_per_replica
        assert all((c.step, c.micro_batches, c.denominator) == (3, [], 0.0) for c in commands)


def test_an_answer_without_a_score_is_not_in_the_loss() -> None:
    groups = [group(0, [1.0, math.nan, 0.0])]
    samples = make_samples(groups, options())
    assert [any(sample.loss_mask) for sample in samples] == [True, False, True]
    scored = [sample for i, sample in enumerate(samples) if i != 1]
    assert loss_denominator(samples, "token_mean") == loss_denominator(scored, "token_mean")


@settings(max_examples=60, deadline=None)
@given(
    answers=st.lists(st.integers(0, 30), min_size=1, max_size=24).filter(any),
    ranks=st.integers(1, 4),
    tokens=st.integers(8, 80),
    inner=st.integers(1, 2),
)
def test_every_sample_goes_to_exactly_one_data_parallel_rank(
    answers: list[int], ranks: int, tokens: int, inner: int
) -> None:
    samples = [to_sample(trajectory(i, 0, n), 1.0) for i, n in enumerate(answers)]
    commands = train_steps(1, samples, options(ranks, tokens, ranks_per_replica=inner))
    assert len(commands) == ranks * inner
    assert len({len(command.micro_batches) for command in commands}) == 1
    assert len({command.denominator for command in commands}) == 1
    seen = [s.ordinal for command in commands[::inner] for mb in command.micro_batches for s in mb.samples]
    assert sorted(seen) == list(range(len(answers)))
    counted = sum(sum(s.loss_mask) for c in commands[::inner] for mb in c.micro_batches for s in mb.samples)
    assert counted == commands[0].denominator


def test_metrics_report_staleness_against_the_training_version() -> None:
    old = PromptGroup(
        Prompt(0, 0, 0, "x"), [trajectory(0, 0, 4, 1.0, version=3), trajectory(0, 1, 4, 0.0, version=5)]
    )
    metrics = rollout_metrics([old], version=5)
    assert metrics["rollout/staleness_mean"] == 1.0
    assert metrics["rollout/staleness_max"] == 2.0
    assert metrics["reward/exact"] == 0.5
    assert rollout_metrics([], 5) == {}


def test_an_unscored_sample_counts_in_no_mean() -> None:
    unscored = trajectory(0, 1, 4, math.nan, rewards={})
    scored = PromptGroup(Prompt(0, 0, 0, "x"), [trajectory(0, 0, 4, 1.0), unscored, trajectory(0, 2, 4, 0.0)])
    metrics = rollout_metrics([scored], version=0)
    assert metrics["rollout/reward_mean"] == metrics["reward/exact"] == 0.5
    assert metrics["rollout/unscored"] == pytest.approx(1 / 3)
    assert make_samples([scored], options())[1].advantages[-1] == 0


def test_a_group_teaches_when_its_scores_differ() -> None:
    """DAPO's filter looks at the scores, not at what the length makes of them."""
    long = group(2, [1.0, 1.0])
    long.trajectories[0].token_ids, long.trajectories[0].log_probs = list(range(20)), [-0.5] * 20
    groups = [group(0, [1.0, 1.0]), group(1, [1.0, 0.0]), long]
    assert [teaches(one, "trajectory") for one in groups] == [False, True, False]
    shaped = options(max_tokens=20, overlong_buffer=10)
    assert any(make_samples([long], shaped)[0].advantages)


def test_the_reward_falls_towards_the_limit() -> None:
    """Of two right answers the longer has less; what is logged is the score."""
    both = group(0, [1.0, 1.0, 0.0])
    both.trajectories[0].token_ids, both.trajectories[0].log_probs = list(range(18)), [-0.5] * 18
    prepared = PreparedStep.of(
        1, [both], options(advantage="group_mean", max_tokens=20, overlong_buffer=4, tokens=128)
    )
    samples = [s for batch in prepared.commands[0].micro_batches for s in batch.samples]
    shaped = [0.5, 1.0, 0.0]
    assert [s.advantages[-1] for s in samples] == pytest.approx([r - sum(shaped) / 3 for r in shaped])
    assert prepared.metrics["rollout/reward_mean"] == pytest.approx(2 / 3)


def test_advantages_over_the_batch_and_a_constant_length() -> None:
    groups = [group(0, [1.0]), group(1, [0.0]), group(2, [0.0])]
    prepared = PreparedStep.of(
        1, groups, options(advantage="batch_std", aggregation="constant_length", loss_length=50)
    )
    assert prepared.commands[0].denominator == 150
    assert prepared.metrics["rollout/zero_variance_groups"] == 0.0


def test_where_the_policy_makes_the_advantages_samples_carry_rewards() -> None:
    groups = [group(0, [1.0, 0.0, math.nan, 0.5]), group(1, [0.25] * 4)]
    made = make_samples(groups, options(rewards_alone=True))
    assert [sample.advantages[-1] for sample in made] == [1.0, 0.0, 0.0, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert not any(made[2].loss_mask), "what could not be scored is not trained on, whatever it says here"
    step = PreparedStep.of(1, groups, options(rewards_alone=True))
    assert step.metrics["rollout/zero_variance_groups"] == 0.5


def episode(sample: int, reward: float, earned: list[float], **changes) -> Trajectory:  # type: ignore[no-untyped-def]
    """Turns of two tokens, each but the last followed by one token of the environment."""
    turns = len(earned)
    mask = ([1, 1, 0] * turns)[:-1]
    return trajectory(
        0,
        sample,
        len(mask),
        reward,
        loss_mask=mask,
        log_probs=[-0.5 * m for m in mask],
        turn_ends=[3 * k + 2 for k in range(turns)],
        turn_rewards=earned,
        metrics={"turns": float(turns)} | ({"tool_calls": 3.0} if turns > 1 else {}),
        **changes,
    )


def test_tokens_of_the_environment_are_not_trained_on() -> None:
    one = episode(0, 1.0, [0.0, 0.0])
    sample = to_sample(one, 0.5)
    assert sample.loss_mask == [0, 0, 0, 1, 1, 0, 1, 1]
    assert sample.advantages == [0, 0, 0, 0.5, 0.5, 0, 0.5, 0.5]
    assert sample.log_probs == [0, 0, 0, -0.5, -0.5, 0, -0.5, -0.5]
    assert loss_denominator([sample], "token_mean") == 4


def test_credit_of_turns_gives_each_turn_its_own_advantage() -> None:
    prompt = Prompt(ordinal=0, epoch=0, row=0, content="x")
    group = PromptGroup(
        prompt, [episode(0, 1.2, [0.2, 0.0]), episode(1, 0.0, [0.0]), episode(2, 1.0, [0.0, 0.0])]
    )
    settings = options(advantage="group_mean", credit="turn")
    samples = make_samples([group], settings)
    # Outcomes 1, 0, 1 have mean 2/3; first turns .2, 0, 0 have mean .2/3; second turns are all 0.
    end, first = 1 / 3, 0.2 * 2 / 3
    assert samples[0].advantages[3:] == pytest.approx([end + first, end + first, 0, end, end])
    assert samples[1].advantages[3:] == pytest.approx([-2 / 3 - 0.2 / 3] * 2)
    assert samples[2].advantages[3:] == pytest.approx([end - 0.2 / 3] * 2 + [0, end, end])
    whole = make_samples([group], options(advantage="group_mean"))
    assert whole[0].advantages[3] == whole[0].advantages[6] == pytest.approx(1.2 - 2.2 / 3)
    # Totals are equal, and still the turns teach something.
    equal = PromptGroup(prompt, [episode(0, 0.2, [0.2, 0.0]), episode(1, 0.2, [0.0, 0.2])])
    assert (teaches(equal, "trajectory"), teaches(equal, "turn")) == (False, True)


def test_numbers_of_trajectories_are_reported_as_means() -> None:
    prompt = Prompt(ordinal=0, epoch=0, row=0, content="x")
    metrics = rollout_metrics([PromptGroup(prompt, [episode(0, 1.0, [0.0, 0.0]), episode(1, 0.0, [0.0])])], 0)
    assert (metrics["rollout/turns"], metrics["rollout/tool_calls"]) == (1.5, 1.5)
