"""Tokens per second of our vLLM engine over `vllm.LLM.generate`: `python -m benchmarks.rollout`.

Both are real vLLM engines in their default processes, with equal engine arguments, equal token prompts and
equal sampling parameters: GROUPS prompts of SAMPLES answers each, all in flight at once, on a random model
of about 29 million parameters. Ours does what a run needs (an engine that can be paused and updated between
two tokens, version spans, log-probs as plain lists); the other is the plain offline call. `--pairs N` and
`--tokens N` make a shorter run.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._report import interleave, report
from hpc_rl.rollout.engine import EngineSettings
from hpc_rl.rollout.engines.config import VllmOptions
from hpc_rl.rollout.engines.vllm import VllmEngine, engine_arguments, sampling_params, set_environment
from hpc_rl.types import Sampling

GROUPS = 8
SAMPLES = 8
PROMPT_TOKENS = 32
GOAL = 0.95
VOCAB = 8192


def make_model(folder: Path) -> int:
    """Write a random model; the number of its parameters."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def prompts() -> list[list[int]]:
    return [[(31 * group + 7 * i) % VOCAB for i in range(PROMPT_TOKENS)] for group in range(GROUPS)]


def sampling(group: int, tokens: int) -> Sampling:
    return Sampling(temperature=1.0, top_p=1.0, max_tokens=tokens, seed=1000 * group)


class Ours:
    """Our engine in an event loop, as the worker uses it."""

    def __init__(self, settings: EngineSettings, tokens: int) -> None:
        self.tokens = tokens
        self.runner = asyncio.Runner()
        self.engine = VllmEngine(settings)
        self.runner.run(self.engine.start())
        self.turn = 0

    def rate(self) -> float:
        """Tokens per second of one round."""
        self.turn += 1
        began = time.perf_counter()
        groups = self.runner.run(self._round())
        seconds = time.perf_counter() - began
        return sum(len(sample.token_ids) for group in groups for sample in group) / seconds

    async def _round(self) -> list[Any]:
        requests = (
            self.engine.generate(ids, sampling(group, self.tokens), SAMPLES, f"{self.turn}-{group}")
            for group, ids in enumerate(prompts())
        )
        return await asyncio.gather(*requests)

    def close(self) -> None:
        self.runner.run(self.engine.close())
        self.runner.close()


class Theirs:
    """vLLM's offline call."""

    def __init__(self, settings: EngineSettings, tokens: int) -> None:
        from vllm import LLM

        self.llm = LLM(**engine_arguments(settings))
        self.tokens = tokens

    def rate(self) -> float:
        params = [sampling_params(sampling(g, self.tokens), SAMPLES, (), self.tokens) for g in range(GROUPS)]
        began = time.perf_counter()
        inputs = [{"prompt_token_ids": ids} for ids in prompts()]
        outputs = self.llm.generate(inputs, params, use_tqdm=False)  # type: ignore[arg-type]
        seconds = time.perf_counter() - began
        return sum(len(answer.token_ids) for output in outputs for answer in output.outputs) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    logging.getLogger("vllm").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_model(Path(folder))
        settings = EngineSettings(
            model=folder,
            options=VllmOptions(extra={"skip_tokenizer_init": True}),
            dtype="float32",
            max_model_len=256,
        )
        set_environment(settings.options)
        ours, theirs = Ours(settings, options.tokens), Theirs(settings, options.tokens)
        print(f"{parameters / 1e6:.1f} M parameters, {GROUPS * SAMPLES} requests in flight")
        for side in (ours, theirs):  # the first rounds allocate
            side.rate()
        try:
            same = interleave(theirs.rate, theirs.rate, options.pairs, say=lambda line: None)
            left, right = interleave(ours.rate, theirs.rate, options.pairs)
            report(
                "rollout",
                [a / b for a, b in zip(left, right, strict=True)],
                goal=GOAL,
                better="higher",
                aa=statistics.median(a / b for a, b in zip(*same, strict=True)),
                tokens_per_s=round(statistics.median(left)),
            )
        finally:
            ours.close()


if __name__ == "__main__":
    main()
