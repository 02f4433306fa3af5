"""Forward and backward of one GRPO step over `trl.GRPOTrainer.compute_loss` and its backward, on the same
rollouts: `python -m benchmarks.learner [--pairs N] [--threads N]`.

16 answers of lognormal length (median 96, sigma 0.8, at most 512) to prompts of 16 to 48 tokens, 8 to a
prompt, with the sampler's log-probs some hundredths of a nat off the model's. One model of 5 million
parameters, fp32. TRL pads prompts and answers (`beta=0, loss_type="dapo"`); ours is the policy's
`StepRunner` on the micro-batches that the controller's packing makes, its own making of tensors included.
Before anything is timed the two losses must be equal to 1e-6 and their gradients to 1e-4 of the largest.
`tokens` are what each side puts through the model: their share is what can be saved. Goal: at most 0.5.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._report import interleave, report_seconds
from benchmarks.grpo_step import make_task
from hpc_rl.algorithms.config import DapoConfig
from hpc_rl.algorithms.dapo import Dapo
from hpc_rl.controller.batch import BatchOptions, train_steps
from hpc_rl.models.base import ParallelSpec
from hpc_rl.models.hf.model import build
from hpc_rl.policy.step import Ranks, StepRunner
from hpc_rl.recipe.schema import Model
from hpc_rl.types import TrainSample

ANSWERS, GROUP, LONGEST = 16, 8, 512
BUDGET = 2048  # tokens of a micro-batch
GOAL = 0.5
CPU = torch.device("cpu")


def make_rollouts(vocabulary: int, seed: int = 0) -> list[TrainSample]:
    """Prompts and answers of random tokens, advantages per answer; log-probs are filled in later."""
    dice = np.random.default_rng(seed)
    found = []
    for number in range(ANSWERS):
        if number % GROUP == 0:
            prompt = dice.integers(2, vocabulary, dice.integers(16, 49)).tolist()
        length = int(np.clip(dice.lognormal(np.log(96), 0.8), 4, LONGEST))
        answer = dice.integers(2, vocabulary, length).tolist()
        before, advantage = len(prompt), float(dice.normal())
        found.append(
            TrainSample(
                ordinal=number // GROUP,
                sample=number % GROUP,
                token_ids=prompt + answer,
                loss_mask=[0] * before + [1] * length,
                log_probs=[],
                advantages=[0.0] * before + [advantage] * length,
            )
        )
    return found


class Ours:
    """The learner of a run of one process."""

    def __init__(self, folder: Path, samples: list[TrainSample]) -> None:
        self.model = build(Model(path=str(folder), dtype="float32"), ParallelSpec(CPU, torch.float32))
        self._record_log_probs(samples)
        options = BatchOptions(1, 1, BUDGET, None, "token_mean")
        (self.command,) = train_steps(1, samples, options)
        self.runner = StepRunner(self.model, Dapo(DapoConfig()), Ranks(0, 1, 1, 1, CPU), sharded=False)

    @torch.no_grad()
    def _record_log_probs(self, samples: list[TrainSample]) -> None:
        """The sampler's: the model's own, and noise."""
        generator = torch.Generator().manual_seed(0)
        for sample in samples:
            ids = torch.tensor([sample.token_ids])
            scores = torch.log_softmax(self.model.module(ids).logits[0, :-1].float(), -1)
            taken = scores.gather(1, ids[0, 1:, None]).squeeze(1)
            noisy = taken + 0.05 * torch.randn(len(taken), generator=generator)
            values = [0.0, *noisy.tolist()]
            sample.log_probs = [lp * m for lp, m in zip(values, sample.loss_mask, strict=True)]

    def step(self) -> tuple[float, list[Tensor]]:
        self.model.module.zero_grad(set_to_none=True)
        micro_batches = [part.samples for part in self.command.micro_batches]
        totals = self.runner.forward_backward(micro_batches, self.command.denominator)
        return float(sum(totals.losses)), [p.grad for p in self.model.module.parameters()]


class Trl:
    """Its trainer, built as a user builds it; `compute_loss` gets the rollouts as its generation hands them
    over: prompts padded on the left, answers on the right."""

    def __init__(self, folder: Path, samples: list[TrainSample]) -> None:
        import datasets
        import transformers
        import trl

        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", attn_implementation="sdpa"
        )
        options = trl.GRPOConfig(
            str(folder / "trl"), per_device_train_batch_size=ANSWERS, num_generations=GROUP,
            max_completion_length=LONGEST, use_cpu=True, bf16=False, beta=0.0, loss_type="dapo",
            epsilon=0.2, epsilon_high=0.28, delta=2.0, temperature=1.0, report_to="none",
            gradient_checkpointing=False,
        )  # fmt: skip
        self.trainer = trl.GRPOTrainer(
            model=model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=options,
            train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * ANSWERS),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )  # fmt: skip
        self.trainer.current_gradient_accumulation_steps = 1
        self.model = self.trainer.model.train()
        self.inputs = self._inputs(samples)

    @staticmethod
    def _inputs(samples: list[TrainSample]) -> dict[str, Any]:
        before = [sample.loss_mask.index(1) for sample in samples]
        after = [len(sample.token_ids) - n for sample, n in zip(samples, before, strict=True)]

        def rows(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(len(samples), width, dtype=dtype)

        prompts, answers = rows(max(before), torch.long), rows(max(after), torch.long)
        prompt_mask, mask = torch.zeros_like(prompts), torch.zeros_like(answers)
        old = rows(max(after), torch.float32)
        for row, (sample, n) in enumerate(zip(samples, before, strict=True)):
            prompts[row, -n:], prompt_mask[row, -n:] = torch.tensor(sample.token_ids[:n]), 1
            size = len(sample.token_ids) - n
            answers[row, :size], mask[row, :size] = torch.tensor(sample.token_ids[n:]), 1
            old[row, :size] = torch.tensor(sample.log_probs[n:])
        return {
            "prompt_ids": prompts, "prompt_mask": prompt_mask, "completion_ids": answers,
            "completion_mask": mask, "old_per_token_logps": old, "num_items_in_batch": mask.sum(),
            "advantages": torch.tensor([sample.advantages[-1] for sample in samples]),
        }  # fmt: skip

    def step(self) -> tuple[float, list[Tensor]]:
        self.model.zero_grad(set_to_none=True)
        loss = self.trainer.compute_loss(self.model, self.inputs)
        loss.backward()
        return float(loss), [p.grad for p in self.model.parameters()]


def check(ours: tuple[float, list[Tensor]], theirs: tuple[float, list[Tensor]]) -> float:
    """The difference of the losses. Fails if that or the gradients' is not rounding."""
    off = abs(ours[0] - theirs[0])
    assert off <= 1e-6, f"the losses are {ours[0]:.8f} and {theirs[0]:.8f}"
    for own, peer in zip(ours[1], theirs[1], strict=True):
        rest = float((own - peer).abs().max() / peer.abs().max())
        assert rest < 1e-4, f"a gradient is off by {rest:.2g} of its largest"
    return off


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="hpc-rl-learner-") as name:
        make_task(Path(name))
        folder = Path(name) / "model"
        samples = make_rollouts(vocabulary=4000)
        ours = Ours(folder, samples)
        trl = Trl(folder, samples)
        off = check(ours.step(), trl.step())

        def timed(step: Any) -> float:
            began = time.perf_counter()
            step()
            return time.perf_counter() - began

        left, right = interleave(lambda: timed(ours.step), lambda: timed(trl.step), options.pairs)
        inputs = trl.inputs
        padded = inputs["prompt_ids"].numel() + inputs["completion_ids"].numel()
        packed = sum(len(sample.token_ids) for sample in samples)
        tokens = {"ours": packed, "peer": padded, "share": round(packed / padded, 3)}
        report_seconds("learner", left, right, goal=GOAL, loss_difference=off, tokens=tokens)


if __name__ == "__main__":
    main()
