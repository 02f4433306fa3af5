"""Checks over several keys, Slurm times, and that a secret is never repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.recipe import load_recipe
from hpc_rl.recipe.checks import parse_time

Write = Callable[..., Path]
Wrong = Callable[..., str]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout=null"], "rollout: kind rl needs a rollout section"),
        (["reward=[]"], "reward: kind rl needs at least one reward"),
        (["algorithm={name: sft}"], "algorithm.name: is 'sft', which belongs to kind sft"),
        (["algorithm=null"], "algorithm: is null (null); must be a mapping"),
        (["algorithm.name=null"], "algorithm.name: is required and missing"),
        (["kind=sft"], "rollout: kind sft has no rollout; remove it, or write null if it is inherited"),
        (
            ["kind=sft", "rollout=null"],
            "reward: kind sft has no reward; remove it, or write [] if it is inherited",
        ),
        (
            ["kind=sft", "rollout=null", "reward=[]"],
            "algorithm.name: is 'grpo'; kind sft has algorithm sft (or none)",
        ),
        (["policy.steps=null"], "policy: set policy.steps or policy.epochs"),
        (
            ["policy.batch_size=10"],
            "policy.batch_size: is 10; must be divisible by algorithm.group_size 4 (nearest: 8 or 12)",
        ),
        (
            ["policy.parallel={dp_shard: 3, dp_replicate: 2}"],
            "policy.batch_size: is 8; must be divisible by the 6 data-parallel ranks (dp_replicate 2 x",
        ),
        (["policy.parallel={dp_shard: 4, ep: 3}"], "policy.parallel.ep: is 3; must divide dp_shard x cp = 4"),
        (["policy.micro_batch_tokens=null"], "policy.micro_batch_tokens: set micro_batch_tokens, or"),
        (["rollout.max_model_len=1024"], "rollout.max_model_len: is 1024; must hold prompt and answer"),
        (["cluster.time=soon"], "cluster.time: is 'soon'; must be a Slurm time"),
        (["cluster.time='0:30'"], "cluster.time: is '0:30'; must be at least one minute"),
        (["cluster.time=5"], "cluster.signal_seconds: is 300; must be shorter than cluster.time (5 minutes)"),
        (
            ["cluster.policy.sbatch=[exclusive]"],
            "cluster.policy.sbatch.0: is 'exclusive'; must be one sbatch option",
        ),
        (
            ["cluster.policy.sbatch=[--time=3]"],
            "cluster.policy.sbatch.0: is '--time=3'; this option is set by cluster",
        ),
        (
            ["cluster.policy.sbatch=[--array=1]"],
            "cluster.policy.sbatch.0: is '--array=1'; hpc-rl sets --array",
        ),
        (["cluster.variables={a-b: x}"], "cluster.variables.a-b: is not a name of an environment variable"),
        (["reward.0.weight=heavy"], "reward.0.weight: must be a number"),
        (
            ["rollout.weights.transport=ncl"],
            "rollout.weights.transport: no transports extension is called 'ncl'",
        ),
        (
            ["policy.trainer=fsdp3"],
            "policy.trainer: no trainers extension is called 'fsdp3'. Did you mean 'fsdp2'?",
        ),
    ],
)
def test_cross_checks(write: Write, wrong: Wrong, overrides: list[str], message: str) -> None:
    assert message in wrong("small.yaml", *overrides)


def test_sbatch_options_that_are_free(write: Write) -> None:
    options = ["--exclusive", "--reservation=r1", "--switches 1@10:00"]
    recipe = load_recipe("small.yaml", [f"cluster.rollout.sbatch={options}"]).recipe
    assert recipe.cluster.rollout.sbatch == options


SECRET = "hf_AbCdEf0123456789"


@pytest.mark.parametrize(
    "override",
    [
        f"cluster.secrets=[{SECRET}]",
        f"cluster.secrets=[HF_TOKEN={SECRET}]",
        f"cluster.secrets={{HF_TOKEN: {SECRET}}}",
        f"cluster.secrets={SECRET}",
        f"cluster.secrets.HF_TOKEN={SECRET}",
        f"cluster.variables.HF_TOKEN={SECRET}",
        f"cluster.policy.variables.WANDB_API_KEY={SECRET}",
        f"logging.wandb.api_key={SECRET}",
        f"hf_token={SECRET}",
    ],
)
def test_secrets_are_refused_and_never_repeated(write: Write, wrong: Wrong, override: str) -> None:
    assert SECRET not in wrong("small.yaml", override)


def test_secrets_in_a_file_are_refused_and_never_repeated(write: Write, wrong: Wrong) -> None:
    for line in (
        f"secrets: [{SECRET}]",
        f"secrets: {{HF_TOKEN: {SECRET}}}",
        f"variables: {{HF_TOKEN: {SECRET}}}",
    ):
        text = wrong(write(f"extends: small.yaml\ncluster:\n  {line}\n"))
        assert text.startswith("r.yaml:3: cluster.")
        assert SECRET not in text


def test_names_of_secrets_are_taken(write: Write) -> None:
    recipe = load_recipe("small.yaml", ["cluster.secrets=[HF_TOKEN, WANDB_API_KEY]"]).recipe
    assert recipe.cluster.secrets == ["HF_TOKEN", "WANDB_API_KEY"]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("30:00", 30),
        ("30:01", 31),
        ("08:00:00", 480),
        ("1-0", 1440),
        ("1-12:30", 2190),
        ("2-01:02:03", 2943),
    ],
)
def test_slurm_times(text: str, minutes: int) -> None:
    assert parse_time(text) == minutes


@pytest.mark.parametrize("text", ["", "1:2:3:4", "1d", "-5", "8h", "UNLIMITED", "1-2-3"])
def test_bad_slurm_times(text: str) -> None:
    with pytest.raises(ValueError, match="Slurm time"):
        parse_time(text)
