"""On-policy distillation in the real trainer: a tiny student moves to a tiny teacher, without any reward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_rl.controller.batch import BatchOptions, PreparedStep
from hpc_rl.recipe.extensions import registry
from hpc_rl.types import Prompt, PromptGroup, Trajectory, VersionSpan
from tests.policy.test_grpo import ANSWER, GROUP, PROMPT, make_trainer, sample
from tests.tiny_models import save_model

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


@torch.no_grad()
def teacher_log_probs(teacher: Any, answers: list[list[int]]) -> list[list[float]]:
    ids = torch.tensor([PROMPT + answer for answer in answers])
    log_probs = teacher(ids).logits[:, len(PROMPT) - 1 : -1].float().log_softmax(-1)
    found: list[list[float]] = log_probs.gather(2, ids[:, len(PROMPT) :, None]).squeeze(2).tolist()
    return found


def test_the_student_moves_to_the_teacher(tiny_model: Path, tmp_path: Path) -> None:
    """From rollouts as replicas send them to steps as the controller packs them. The reverse KL per token,
    estimated on 32 fresh answers of the student, falls below half of what it was."""
    from transformers import AutoModelForCausalLM

    (tmp_path / "teacher").mkdir()
    folder = save_model(tmp_path / "teacher", "qwen2", seed=11)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4)  # a random model knows nothing; this one is sure of some tokens
    trainer = make_trainer(tmp_path, tiny_model, name="distill")
    config = registry("algorithms").config("distill", {"group_size": GROUP})
    packing = {
        "data_parallel": 1,
        "ranks_per_replica": 1,
        "micro_batch_tokens": 128,
        "micro_batch_size": None,
    }
    options = BatchOptions.of(config, max_tokens=ANSWER, **packing)
    divergences = []
    for step in range(1, 41):
        answers = sample(trainer, 1.0)
        scored = teacher_log_probs(teacher, [answer for answer, _ in answers])
        if step == 1:
            scored[0][1] = math.nan  # not scored: out of mask and denominator
        trajectories = [
            Trajectory(
                *(0, number, 0, PROMPT, answer, log_probs, [VersionSpan(step - 1, 0, ANSWER)], "stop"),
                teacher_log_probs=theirs,
            )
            for number, ((answer, log_probs), theirs) in enumerate(zip(answers, scored, strict=True))
        ]
        group = PromptGroup(Prompt(ordinal=0, epoch=0, row=0, content="x"), trajectories)
        prepared = PreparedStep.of(step, [group], options)
        metrics = trainer.train_step(prepared.commands[0])
        assert metrics["train/tokens"] == GROUP * ANSWER - (step == 1)
        assert prepared.metrics["rollout/zero_variance_groups"] == 0  # the teacher teaches without rewards
        divergences.append(metrics["train/kl_teacher"])
    trainer.close()
    assert divergences[0] > 0.5
    assert sum(divergences[-5:]) / 5 < 0.5 * divergences[0]
