"""One whole GRPO step ÷ that of `trl.GRPOTrainer` on the CPU: prompts in, answers, rewards, gradient, update.

The same random model, prompts, reward and optimizer: 16 answers of 64 tokens a step, 8 to a prompt. TRL
generates with Transformers and then trains, on all cores. Ours is the whole system as a user runs it
(supervisor, controller, Redis, vLLM replica, policy), asynchronous with the default staleness, on the same
cores. Whole runs alternate; loading does not count. Goal: at most 0.8.

    python -m benchmarks.grpo_step [--steps 60] [--pairs 3]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks._report import control, report

ROOT = Path(__file__).resolve().parent.parent
GROUP_SIZE, PROMPTS, TOKENS = 8, 2, 64
WARM_UP = 5  # steps of either side that do not count
GOAL = 0.8
LEARNING_RATE = 1e-5
RUN_LIMIT_S = 1800.0

REWARD = '''"""The reward of benchmarks.grpo_step: how many different characters an answer has."""


def variety(prompt, response, answer, fields):
    return len(set(response)) / 64
'''


def make_task(folder: Path) -> None:
    """A random model of 5 million parameters, a byte-level tokenizer, prompts, and the reward."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a in alphabet[:64] for b in alphabet[:62]]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *pairs, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, eos_token_id=vocabulary["<eos>"], bos_token_id=None,
        pad_token_id=vocabulary["<eos>"],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    rows = ({"prompt": f"Say something about the number {i:04d}: ", "answer": ""} for i in range(2000))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "variety.py").write_text(REWARD)


def write_recipe(folder: Path, steps: int, *, staleness: int = 2) -> Path:
    recipe = {
        "name": "grpo-step",
        "kind": "rl",
        "output_root": str(folder / "runs"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {"train": {"path": str(folder / "train.jsonl"), "format": "prompt_answer", "chat": False}},
        "algorithm": {"name": "grpo", "group_size": GROUP_SIZE, "max_staleness": staleness},
        "plugins": [str(folder / "variety.py")],
        "reward": [{"name": "python", "function": "variety:variety"}],
        "policy": {
            "batch_size": PROMPTS * GROUP_SIZE,
            "micro_batch_tokens": 4096,
            "steps": steps,
            "optimizer": {"lr": LEARNING_RATE, "weight_decay": 0.0, "clip_norm": 1.0},
        },
        "rollout": {"engine": "vllm", "max_tokens": TOKENS, "max_model_len": 256},
        "checkpoint": {"enabled": False, "export": "off"},
        "eval": {"every": 0, "before": False},
        "logging": {"wandb": {"mode": "off"}},
        "cluster": {"placement": "local"},
    }
    path = folder / "grpo-step.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def ours(recipe: Path) -> list[float]:
    """Seconds between the ends of the steps of one run."""
    hpc_rl = [sys.executable, "-m", "hpc_rl.cli.main"]
    done = subprocess.run(
        [*hpc_rl, "submit", str(recipe), "--site", "local", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    run_dir = Path(json.loads(done.stdout)["run_dir"])
    deadline = time.monotonic() + RUN_LIMIT_S
    while time.monotonic() < deadline:
        time.sleep(5)  # rarely: asking costs a Python start on the same cores
        answer = subprocess.run(
            [*hpc_rl, "status", str(run_dir), "--json"], capture_output=True, text=True, check=True
        )
        state = json.loads(answer.stdout)
        if state["state"] == "COMPLETED":
            break
        if state["state"] in ("FAILED", "CANCELLED"):
            sys.exit(f"grpo_step: the run ended as {state['state']}: {state['first_cause']}")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    ends = [row["time"] for row in rows]
    return [b - a for a, b in itertools.pairwise(ends)]


def trl_steps(folder: Path, steps: int) -> list[float]:
    """Seconds of the steps of `trl.GRPOTrainer`, in this process."""
    import datasets
    import transformers
    import trl

    from benchmarks._sft_peers import step_seconds

    def variety(completions: list[str], **others: Any) -> list[float]:
        return [len(set(text)) / 64 for text in completions]

    options = trl.GRPOConfig(
        str(folder / "trl"), per_device_train_batch_size=PROMPTS * GROUP_SIZE, num_generations=GROUP_SIZE,
        max_completion_length=TOKENS, max_steps=steps, learning_rate=LEARNING_RATE, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch_fused", use_cpu=True, bf16=False,
        beta=0.0, temperature=1.0, logging_strategy="no", save_strategy="no", report_to="none",
        disable_tqdm=True, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype="float32", attn_implementation="sdpa"
    )
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=variety, args=options, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    return step_seconds(trainer)


def peer(folder: Path, steps: int) -> list[float]:
    """`trl_steps` in a process of its own, so that neither side runs beside what the other left behind."""
    command = [sys.executable, "-m", "benchmarks.grpo_step", "--peer", str(folder), "--steps", str(steps)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=RUN_LIMIT_S,
        env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"},
    )  # fmt: skip
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    steps = arguments.steps
    if arguments.peer is not None:
        print(json.dumps(trl_steps(arguments.peer, steps)))
        return
    with tempfile.TemporaryDirectory(prefix="hpc-rl-grpo-") as name:
        folder = Path(name)
        make_task(folder)
        recipe = write_recipe(folder, steps)
        left, right = [], []
        for pair in range(arguments.pairs):
            turns = [(left, lambda: ours(recipe)), (right, lambda: peer(folder, steps))]
            for side, run in turns if pair % 2 == 0 else turns[::-1]:
                # The mean, not the median: what one step waits for the next has done.
                side.append(statistics.mean(run()[WARM_UP:]))
            ratio = left[-1] / right[-1]
            print(f"pair {pair + 1}: ours {left[-1]:.3f} s, TRL {right[-1]:.3f} s, {ratio:.3f}", flush=True)
        ratios = [a / b for a, b in zip(left, right, strict=True)]
        facts = {
            "steps": steps, "ours_s": round(statistics.median(left), 4),
            "peer_s": round(statistics.median(right), 4),
        }  # fmt: skip
        report("grpo_step", ratios, goal=GOAL, better="lower", aa=control(right), **facts)


if __name__ == "__main__":
    main()
