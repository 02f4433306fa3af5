"""`transformers.Trainer` and `trl.SFTTrainer` on the benchmark's model and rows, timed by callbacks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks._sft_parts import LEARNING_RATE

OPTIONS: dict[str, Any] = {
    "learning_rate": LEARNING_RATE,
    "weight_decay": 0.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "optim": "adamw_torch_fused",
    "use_cpu": True,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "logging_strategy": "no",
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Clock(transformers.TrainerCallback):
    """When each step began, and the end."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.append(time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.moments.append(time.perf_counter())


def step_seconds(trainer: Any) -> list[float]:
    """Train; how long each step lasted, its share of the loop around it included."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return [b - a for a, b in zip(clock.moments, clock.moments[1:], strict=False)]


def load(model: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="sdpa"
    )


def transformers_trainer(folder: Path, model: Path, rows: list[list[int]], batch: int, steps: int) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=steps, **OPTIONS
    )
    dataset = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in rows]
    return transformers.Trainer(model=load(model), args=arguments, train_dataset=dataset)  # type: ignore[arg-type]


def sft_trainer(folder: Path, model: Path, rows: list[list[int]], batch: int, steps: int) -> Any:
    """`trl.SFTTrainer` on rows that are tokenised already."""
    import datasets
    import trl

    arguments = trl.SFTConfig(
        str(folder), per_device_train_batch_size=batch, max_steps=steps, packing=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, bf16=False, **OPTIONS,
    )  # fmt: skip
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return trl.SFTTrainer(
        model=load(model), args=arguments, train_dataset=dataset, processing_class=tokenizer
    )
