"""Checks over several keys, Slurm times, and that a secret is never repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_rl.recipe import load_recipe
from hpc_rl.recipe.checks import parse_time

Write = Callable[..., Path]
Wrong = Callable[..., str]


KL = "algorithm={name: grpo, group_size: 4, kl_beta: 0.1}"


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
        (
            ["policy.batch_tokens=40000", "policy.micro_batch_tokens=16384"],
            "policy.batch_tokens: is 40000; must be a multiple of micro_batch_tokens 16384, a row's size "
            "(nearest: 32768 or 49152)",
        ),
        (
            ["model.dtype=float16"],
            "model.dtype: is 'float16'; gradients underflow in it without loss scaling",
        ),
        (
            [
                *("kind=sft", "rollout=null", "reward=[]", "algorithm={name: sft}", "policy.trainer=fsdp2"),
                *("policy.parallel={dp_shard: 4, tp: 2}", "model.lora={dropout: 0.1}"),
            ],
            "model.lora={dropout: 0.1}': model.lora.dropout: is 0.1; with policy.parallel.tp each rank",
        ),
        (
            [
                *("policy.parallel={dp_shard: 4, tp: 2}", "policy.trainer=fsdp2"),
                "model.lora={target_parameters: [experts.down_proj]}",
            ],
            "policy.parallel.tp: is 2; adapters of model.lora.target_parameters are not split, keep 1",
        ),
        (["policy.micro_batch_tokens=null"], "policy.micro_batch_tokens: set micro_batch_tokens, or"),
        (
            ["policy.optimizer.betas=[0.9, 1]"],
            "policy.optimizer.betas.1: is 1; must be less than 1.0",
        ),
        (["policy.optimizer.betas=[-0.1, 0.9]"], "policy.optimizer.betas.0: is -0.1; must be at least 0"),
        (
            ["policy.optimizer.warmup_ratio=0.1", "policy.optimizer.warmup_steps=3"],
            "policy.optimizer.warmup_ratio: warmup_steps and warmup_ratio are both set; keep one",
        ),
        (
            ["policy.optimizer.lr=1e-5", "policy.optimizer.min_lr=1e-4"],
            "policy.optimizer.min_lr: is 0.0001; must be at most lr, which is 1e-05",
        ),
        (
            ["policy.optimizer.decay_steps=5"],
            "policy.optimizer.decay_steps: belongs to schedule wsd; the schedule is constant",
        ),
        (
            ["policy.steps=9", "policy.optimizer={schedule: wsd, decay_steps: 10}"],
            "policy.optimizer.decay_steps: is 10; must be at most policy.steps, which is 9",
        ),
        (
            ["policy.steps=9", "policy.optimizer={schedule: wsd, decay_steps: 8, warmup_steps: 2}"],
            "policy.optimizer.decay_steps: is 8; with 2 steps of warm-up that is more than policy.steps 9",
        ),
        (
            ["policy.optimizer.groups=[{match: '(', lr: 1e-5}]"],
            "policy.optimizer.groups.0.match: is '('; no regular expression: missing ), unterminated",
        ),
        (
            ["policy.optimizer.groups=[{match: norm}]"],
            "policy.optimizer.groups.0.match: is 'norm'; give this group an lr or a weight_decay of its own",
        ),
        (
            ["model.dtype=float32", "rollout.weights.mode=delta"],
            "rollout.weights.mode: is 'delta', which is for 16-bit weights; model.dtype is float32: use full",
        ),
        (
            ["model.dtype=bfloat16", "rollout.weights={mode: delta, transport: nccl}"],
            "rollout.weights.transport: is 'nccl'; mode delta needs gloo",
        ),
        (
            ["rollout.weights={overlap: true, transport: nccl}"],
            "rollout.weights.transport: is 'nccl'; overlap needs gloo",
        ),
        (
            ["model.dtype=bfloat16", "rollout.weights={mode: delta, overlap: false}"],
            "rollout.weights.overlap: is false; with mode delta both sides keep copies and pushes overlap",
        ),
        (
            [*("model.dtype=bfloat16", "model.lora={}"), "rollout.weights={mode: delta, lora: adapter}"],
            "rollout.weights.mode: is 'delta'; an adapter alone travels whole: use full",
        ),
        (["eval.samples=4"], "eval.samples: is 4; at temperature 0 all answers are alike: set eval.temp"),
        (["eval.top_p=0.9"], "eval.top_p: is 0.9; it does nothing at temperature 0"),
        (
            ["eval={samples: 4, temperature: 2.5}", "rollout.engine=vllm"],
            "eval.temperature: is 2.5; rollout.engine vllm takes at most 2",
        ),
        (
            ["data.eval={path: e.jsonl}", "eval={samples: 4, temperature: 1, best: pass@4}"],
            "eval.best: is 'pass@4'; must be one of eval/accuracy, eval/reward_mean,",
        ),
        (
            ["data.eval={path: e.jsonl}", "eval.best=eval/pass@2"],
            "eval/pass@1. Did you mean 'eval/pass@1'?",
        ),
        (["eval.best_mode=min"], "eval.best_mode: belongs to eval.best: name the metric"),
        (["data.eval=null", "eval.best=eval/accuracy"], "without data.eval nothing is measured"),
        (
            ["kind=sft", "rollout=null", "reward=[]", "algorithm={name: sft}", "eval.samples=2"],
            "eval.samples: belongs to kind rl; kind sft evaluates by a loss",
        ),
        (["policy.guard.spike=3"], "policy.guard.spike: belongs to kind sft: the loss of a policy gradient"),
        (["policy.optimizer.clip_norm=0"], "policy.optimizer.clip_norm: is 0; must be greater than 0"),
        (["algorithm.clip_high=.inf"], "algorithm.clip_high: is Infinity"),
        (["seed=4294967296"], "seed: is 4294967296; must be at most 4294967295"),
        (["policy.steps=100000000"], "policy.steps: is 100000000; must be at most 99999999"),
        (["policy.batch_size=4294967296"], "policy.batch_size: is 4294967296; must be at most 2147483647"),
        (
            ["algorithm.overlong_buffer=100", "rollout.max_tokens=99"],
            "algorithm.overlong_buffer: is 100; must be at most rollout.max_tokens, which is 99",
        ),
        (
            ["algorithm={name: dapo, group_size: 4}", "reward=[{name: exact}, {name: overlong, buffer: 9}]"],
            "algorithm.overlong_buffer: shapes the rewards of long answers, as the reward overlong does",
        ),
        (
            ["rollout.engine=vllm", "algorithm.temperature=2.5"],
            "algorithm.temperature: is 2.5; rollout.engine vllm takes at most 2",
        ),
        (
            ["model.attn_implementation=flash"],
            "model.attn_implementation: is 'flash'; allowed: sdpa, eager, flash_attention_2, "
            "flash_attention_3, flash_attention_4, flex_attention. Did you mean 'flash_attention_2'?",
        ),
        (["model.attn_implementation=SDPA"], "Did you mean 'sdpa'?"),
        (
            ["policy.reference.reset_every=5"],
            "policy.reference: nothing in this recipe is held to a reference: leave it out, or set algorithm",
        ),
        (
            [KL, "policy.reference.mode=lora_off"],
            "policy.reference.mode: is 'lora_off'; there are no adapters without model.lora: use full",
        ),
        (
            [KL, "model.lora={modules_to_save: [lm_head]}", "policy.reference.mode=lora_off"],
            "policy.reference.mode: is 'lora_off'; modules of model.lora.modules_to_save stay trained",
        ),
        (
            [KL, "model.lora={r: 4}", "policy.reference={mode: lora_off, reset_every: 5}"],
            "policy.reference.mode: is 'lora_off', which is the policy's own model: path, reset_every and",
        ),
        (
            [KL, "policy.reference={path: other, reset_every: 5}"],
            "policy.reference.reset_every: copies the policy into the reference, which must begin as the",
        ),
        (
            [KL, "policy.reference.revision=main"],
            "policy.reference.revision: belongs to policy.reference.path, which is not set",
        ),
        (
            ["policy.updates.mini_batches=1000"],
            "policy.updates.mini_batches: is 1000; must be at most policy.batch_size",
        ),
        (
            ["data.train.template=Say it"],
            "data.train.template: is 'Say it'; it names no column (as {question} would), so every row",
        ),
        (["data.train.template='{} and {0}'"], "data.train.template: is '{} and {0}'; it names no column"),
        (
            ["data.eval={path: e.jsonl, template: 'Solve {q'}"],
            "data.eval.template: is 'Solve {q'; expected '}' before end of string",
        ),
        (["cluster.time=99999999:00:00"], "cluster.time: is '99999999:00:00'; must be at most 365 days"),
        (["cluster.time=08:61:00"], "cluster.time: is '08:61:00'; must have minutes and seconds below 60"),
        (["cluster.time=" + "9" * 5000], "must be a Slurm time"),
        (["cluster.policy.mem=lots"], 'cluster.policy.mem: is "lots"; must be a size as sbatch takes it'),
        (["cluster.controller.mem=8 G"], 'cluster.controller.mem: is "8 G"; must be a size'),
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
        (["reward.0.limit_s=0"], "reward.0.limit_s: must be greater than 0"),
        (["reward.0.memory_gb=all"], "reward.0.memory_gb: must be a number"),
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


@pytest.mark.parametrize("text", ["08:61:00", "08:00:60", "1:60", "1-02:60", "1-02:00:99"])
def test_minutes_and_seconds_are_below_60(text: str) -> None:
    with pytest.raises(ValueError, match="below 60"):
        parse_time(text)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.temperature=2.5"],  # engine hf takes any
        ["policy.batch_tokens=49152", "policy.micro_batch_tokens=16384"],
        ["policy.batch_tokens=1000", "policy.micro_batch_tokens=16384"],  # one row of 1000 tokens
        ["policy.batch_tokens=1000", "policy.micro_batch_size=3"],
        ["rollout.engine=vllm", "algorithm.temperature=2"],
        ["model.attn_implementation=kernels-community/flash-attn"],
        ["model.attn_implementation=flash_attention_2"],
        ["data.train.template='Q: {question[0]!r:>8} {{literal}}'"],
        ["cluster.policy.mem=500g", "cluster.rollout.mem=0", "cluster.controller.mem=16GB"],
        ["cluster.policy.mem=64000"],
    ],
)
def test_what_is_at_the_edge_and_right(write: Write, overrides: list[str]) -> None:
    load_recipe("small.yaml", overrides)


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
        ("365-0", 525600),
    ],
)
def test_slurm_times(text: str, minutes: int) -> None:
    assert parse_time(text) == minutes


@pytest.mark.parametrize("text", ["", "1:2:3:4", "1d", "-5", "8h", "UNLIMITED", "1-2-3"])
def test_bad_slurm_times(text: str) -> None:
    with pytest.raises(ValueError, match="Slurm time"):
        parse_time(text)
