"""What the SFT benchmarks share: a random Llama, rows of known lengths, our trainer, a bare PyTorch loop."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rl.bus.messages import TrainStep
from hpc_rl.plan.schema import Group, Mesh, Plan
from hpc_rl.policy.fsdp2 import Fsdp2Trainer
from hpc_rl.policy.trainer import TrainerContext
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir

VOCAB, EOS, PAD = 4096, 1, 0
LEARNING_RATE = 1e-4
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def save_model(folder: Path, config: Any = None, dtype: torch.dtype = torch.float32) -> int:
    """Write a random model (a small Llama) and a tokenizer of the words w2, w3, ...; its parameters."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config or transformers.LlamaConfig(**LLAMA), dtype=dtype
    )
    model.save_pretrained(folder)
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_rows(path: Path, lengths: Sequence[int]) -> list[list[int]]:
    """Write rows of text that become just so many tokens, the end included; the tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        [*torch.randint(2, VOCAB, (length - 1,), generator=generator).tolist(), EOS] for length in lengths
    ]
    lines = (json.dumps({"text": " ".join(f"w{i}" for i in row[:-1])}) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return rows


def make_trainer(
    folder: Path,
    model: Path,
    rows: Path,
    *,
    on_gpu: bool = False,
    attention: str | None = None,
    **policy: Any,
) -> Fsdp2Trainer:
    """Our trainer in this process, without a bus: fp32 (on a GPU bf16), rows in file order, no decay."""
    dtype = "bfloat16" if on_gpu else "float32"
    optimizer = {"lr": LEARNING_RATE, "weight_decay": 0.0, "clip_norm": 1.0}
    recipe = Recipe.model_validate(
        {
            "name": "bench",
            "kind": "sft",
            "model": {"path": str(model), "dtype": dtype, "attn_implementation": attention},
            "data": {"train": {"path": str(rows), "format": "text", "shuffle": False}},
            "policy": {"steps": 100_000, "optimizer": optimizer, **policy},
            "checkpoint": {"enabled": False, "export": "off"},
        }
    )
    group = Group(
        role="policy", component=None, job_name="bench:policy", nodes=1, tasks=1, tasks_per_node=1,
        cpus_per_task=1, gpus_per_task=int(on_gpu), gpus_per_node=int(on_gpu),
    )  # fmt: skip
    plan = Plan(
        name="bench", kind="sft", placement="local", site="local", time_minutes=5, groups=[group], mesh=Mesh()
    )
    log = logging.getLogger("benchmark")
    trainer = Fsdp2Trainer(
        TrainerContext(recipe, plan, RunDir.create(folder, "bench"), 0, 1, 1, 1, None, log)
    )
    trainer.load()
    return trainer


class Ours:
    """One `train_step` per call: data, forward, backward, clipping, optimizer, metrics."""

    def __init__(self, trainer: Fsdp2Trainer) -> None:
        self.trainer = trainer
        self.metrics: dict[str, float] = {}
        self.loss = 0.0

    def step(self) -> float:
        began = time.perf_counter()
        self.metrics = self.trainer.train_step(TrainStep(self.trainer.step + 1))
        self.loss = self.metrics["train/loss"]
        return time.perf_counter() - began

    def close(self) -> None:
        self.trainer.close()


class Bare:
    """The loop that everyone writes: `model(input_ids)`, fp32 cross-entropy, clip, fused AdamW.

    `batches` are [B, S] each, padded with PAD on the right where lengths differ; then an attention mask
    goes along. They are used in turns.
    """

    def __init__(self, model: Path, batches: list[Tensor]) -> None:
        import transformers

        self.module: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self.batches, self.turn, self.loss = batches, 0, 0.0
        self.padded = any(bool((batch == PAD).any()) for batch in batches)
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def step(self) -> float:
        began = time.perf_counter()
        ids = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        more = {"attention_mask": (ids != PAD).long()} if self.padded else {}
        logits = self.module(input_ids=ids, use_cache=False, **more).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = float(loss.detach())
        return time.perf_counter() - began


def padded(rows: list[list[int]]) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
