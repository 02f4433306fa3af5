"""Golden texts: each mistake gives one line with file, line, key, value, what is allowed, nearest key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[..., Path]
Wrong = Callable[..., str]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "eval: {evry: 3}",
            "r.yaml:2: eval.evry: unknown key (value 3). Did you mean 'every'? "
            "Allowed here: before, best, best_mode, checkpoint, every, max_tokens, only, samples, "
            "temperature, threshold, top_p.",
        ),
        (
            "checkpoint: {mode: asink}",
            "r.yaml:2: checkpoint.mode: is \"asink\"; allowed: 'async' or 'sync'. Did you mean 'async'?",
        ),
        ("seed: many", 'r.yaml:2: seed: is "many" (text); must be an integer'),
        ("seed: 1.5", "r.yaml:2: seed: is 1.5 (a number); must be an integer"),
        ("seed: true", "r.yaml:2: seed: is true (true/false); must be an integer"),
        ("seed: -1", "r.yaml:2: seed: is -1; must be at least 0"),
        (
            'seed: "3"',
            'r.yaml:2: seed: is "3" (text); must be an integer (write digits without quotes or underscores)',
        ),
        (
            "seed: 1_000",
            'r.yaml:2: seed: is "1_000" (text); must be an integer '
            "(write digits without quotes or underscores)",
        ),
        (
            "eval: {before: yes}",
            'r.yaml:2: eval.before: is "yes" (text); must be true or false (write true, without quotes)',
        ),
        ("name: null", "r.yaml:2: name: is null (null); must be text"),
        ("model: qwen", 'r.yaml:2: model: is "qwen" (text); must be a mapping'),
        ("reward: exact", 'r.yaml:2: reward: is "exact" (text); must be a list'),
        ("reward: [{name: exakt}]", None),
        ("name: a/b", 'r.yaml:2: name: is "a/b"; must match ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$'),
        (
            "save_freq: 20",
            "r.yaml:2: save_freq: unknown key (value 20); it is called checkpoint.save_every here",
        ),
        ("max_keep: 3", "r.yaml:2: max_keep: unknown key (value 3); it belongs at checkpoint.max_keep"),
        ("batch_size: 3", "r.yaml:2: batch_size: unknown key (value 3); it belongs at policy.batch_size"),
        (
            "policy: {parallel: {dp_shard_size: 8}}",
            "r.yaml:2: policy.parallel.dp_shard_size: unknown key (value 8); "
            "it is called policy.parallel.dp_shard here",
        ),
        (
            "policy: {parallel: {fsdp_shard_size: 8}}",
            "r.yaml:2: policy.parallel.fsdp_shard_size: unknown key (value 8); "
            "it is called policy.parallel.dp_shard here",
        ),
        (
            "policy: {train_batch_per_replica: 8}",
            "r.yaml:2: policy.train_batch_per_replica: unknown key (value 8); "
            "it is called policy.batch_size (over all ranks) here",
        ),
        (
            "policy: {epoch: 1}",
            "r.yaml:2: policy.epoch: unknown key (value 1); it is called policy.epochs here",
        ),
        (
            "model: {action_token_len: 7}",
            "r.yaml:2: model.action_token_len: unknown key (value 7); "
            "it is called model.action_dim (vision-language-action models) here",
        ),
        (
            "algorithm: {epsilon_low: 0.2}",
            "r.yaml:2: algorithm.epsilon_low: unknown key (value 0.2); it is called algorithm.clip_low here",
        ),
        ("algorithm: {clip_low: -1}", "r.yaml:2: algorithm.clip_low: is -1; must be at least 0"),
        (
            "rollout: {engine_options: {thread: 2}}",
            "r.yaml:2: rollout.engine_options.thread: unknown key (value 2). Did you mean 'threads'?",
        ),
        (
            "logging: {wandb: {api_key: abc123}}",
            "r.yaml:2: logging.wandb.api_key: unknown key (value (hidden)).",
        ),
    ],
)
def test_message(write: Write, wrong: Wrong, line: str, message: str | None) -> None:
    text = wrong(write(f"extends: small.yaml\n{line}\n"))
    if message is None:
        assert text.startswith(
            "r.yaml:2: reward.0.name: no rewards extension is called 'exakt'. Did you mean 'exact'?"
        )
    else:
        assert text.splitlines()[0].startswith(message)
    assert "abc123" not in text
    assert len(text.splitlines()) == 1


def test_every_mistake_is_reported_at_once(write: Write, wrong: Wrong) -> None:
    text = wrong(write("extends: small.yaml\nseed: x\npolicy: {stepz: 1}\n"), "eval.every=-1")
    assert [line.split(": ")[:2] for line in text.splitlines()] == [
        ["r.yaml:2", "seed"],
        ["r.yaml:3", "policy.stepz"],
        ["override 'eval.every=-1'", "eval.every"],
    ]


def test_missing_required_keys_name_the_file(write: Write, wrong: Wrong) -> None:
    assert wrong(write("name: x\nkind: sft\n")).splitlines() == [
        "r.yaml:1: model: is required and missing",
        "r.yaml:1: data: is required and missing",
    ]


def test_no_such_recipe_lists_the_shipped_ones(write: Write, wrong: Wrong) -> None:
    text = wrong("nowhere.yaml")
    assert "no recipe file" in text
    assert "gsm8k-grpo" in text


def test_a_mistake_in_the_base_names_the_base(write: Write, wrong: Wrong) -> None:
    write("extends: small.yaml\nseed: x\n", "base.yaml")
    assert wrong(write("extends: base.yaml\nname: top\n")).startswith("base.yaml:2: seed:")


def test_where_text_is_wanted_unquoted_numbers_are_text(write: Write) -> None:
    from hpc_rl.recipe import load_recipe

    path = write(
        "extends: small.yaml\nmodel: {path: m, revision: 0123456}\ncluster: {variables: {A: 1, B: 1e3}}\n"
    )
    recipe = load_recipe(path, ["cluster.time=90", "name=7"]).recipe
    assert recipe.model.revision == "0123456"
    assert recipe.cluster.variables == {"A": "1", "B": "1e3"}
    assert recipe.cluster.time == "90"
    assert recipe.name == "7"


def test_unknown_keys_do_not_hide_the_other_mistakes(write: Write, wrong: Wrong) -> None:
    text = wrong(
        write("extends: small.yaml\nfoo: 1\npolicy: {stepz: 1, batch_size: 6}\nreward: [{name: exakt}]\n")
    )
    assert [line.split(": ")[:2] for line in text.splitlines()] == [
        ["r.yaml:3", "policy.stepz"],
        ["r.yaml:2", "foo"],
        ["r.yaml:4", "reward.0.name"],
        ["r.yaml:3", "policy.batch_size"],
    ]


@pytest.mark.parametrize(
    "key", ["rolout: {engine: hf}", "rewart: [{name: exact}]", "algorithn: {name: grpo}"]
)
def test_a_misspelt_section_is_one_mistake(write: Write, wrong: Wrong, key: str) -> None:
    """Without the section that was meant the recipe lacks one; saying that too would mislead."""
    right = {"rolout": "rollout", "rewart": "reward", "algorithn": "algorithm"}[key.partition(":")[0]]
    small = Path("small.yaml").read_text().replace(f"\n{right}:", "\nignored:")
    lines = [line for line in small.splitlines() if not line.startswith("ignored:")]
    text = wrong(write("\n".join([key, *lines]) + "\n"))
    assert text.startswith(f"r.yaml:1: {key.partition(':')[0]}: unknown key")
    assert len(text.splitlines()) == 1


def test_kind_preference_has_pairs_and_no_rollouts(write: Write, wrong: Wrong) -> None:
    begin = "name: x\nmodel: {path: m}\npolicy: {steps: 5}\n"
    said = wrong(write(f"kind: preference\n{begin}data: {{train: {{path: d}}}}\nreward: [{{name: exact}}]\n"))
    assert "r.yaml:5: data.train.format: is 'prompt_answer'; kind preference has format preference" in said
    assert "kind preference has no reward; remove it" in said
    data = "data: {train: {path: d, format: preference}}\n"
    said = wrong(write(f"kind: preference\n{begin}{data}algorithm: {{name: grpo}}\n"))
    assert "algorithm.name: is 'grpo'; kind preference has algorithm dpo (or none)" in said
    said = wrong(write(f"kind: sft\n{begin}{data}"))
    assert "data.train.format: is 'preference'; kind sft has no pairs; they belong to kind preference" in said
    said = wrong(write(f"kind: preference\n{begin}{data}algorithm: {{loss: simpo}}\n"))
    assert """algorithm.loss: is "simpo"; allowed: 'sigmoid', 'ipo' or 'hinge'""" in said


def test_the_keys_of_a_reward_include_its_name_and_weight(write: Write, wrong: Wrong) -> None:
    text = wrong(write("extends: small.yaml\nreward: [{name: exact, wieght: 2}]\n"))
    assert "Did you mean 'weight'?" in text
    listed = text.partition("Allowed here: ")[2].rstrip(".").split(", ")
    assert {"name", "weight"} <= set(listed)
    text = wrong(write("extends: small.yaml\nalgorithm: {group_sise: 4}\n"))
    assert "Did you mean 'group_size'?" in text
    assert ", name, " in text


def test_over_sampling_and_refill_say_what_they_belong_to(write: Write, wrong: Wrong) -> None:
    text = wrong(write("extends: small.yaml\nrollout: {oversample: 0.25, order: strict}\n"))
    assert "rollout.oversample: is 0.25; it is not for rollout.order strict" in text
    text = wrong(write("extends: small.yaml\nalgorithm: {max_refill: 1}\n"))
    assert "max_refill belongs to drop_zero_variance: true" in text
    text = wrong(write("extends: small.yaml\nrollout: {max_in_flight: 0}\n"))
    assert "rollout.max_in_flight" in text and "auto" in text
