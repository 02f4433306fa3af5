"""An SFT step of ours over a bare loop on one GPU, and its MFU: `python -m benchmarks.sft_gpu`.

Random Qwen3-shaped models of 0.6 and 7 billion parameters. Both sides: fp32 master weights, bf16 compute (the
bare loop by autocast), fused AdamW, clip 1.0, the same batches; the larger one with activation
checkpointing. Its state does not fit twice, so each side runs in a process of its own, in turns: bare, ours,
bare. Needs CUDA; without it this says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._report import report
from benchmarks._sft_parts import LEARNING_RATE, Ours, make_rows, make_trainer, padded, save_model

# size -> Qwen3 shape, sequences per step, tokens per sequence, activation checkpointing
SHAPE = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 8192}
SIZES: dict[str, tuple[dict[str, Any], int, int, bool]] = {
    "0.6b": (
        {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
         "tie_word_embeddings": True}, 8, 2048, False,
    ),
    "7b": (
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 30, "num_attention_heads": 32,
         "tie_word_embeddings": False}, 1, 4096, True,
    ),
}  # fmt: skip
WARM_UP, STEPS, ROWS = 5, 30, 64


class BareBf16:
    """`model(input_ids)` under autocast, fp32 cross-entropy, clip, fused AdamW on fp32 weights."""

    def __init__(self, model: Path, batches: list[torch.Tensor], attention: str, checkpointing: bool) -> None:
        import transformers

        self.module: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=attention
        )
        self.module.cuda().train()
        if checkpointing:
            self.module.gradient_checkpointing_enable({"use_reentrant": False})
        self.batches, self.turn = [batch.cuda() for batch in batches], 0
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self) -> float:
        began = time.perf_counter()
        ids = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.module(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began


def run_side(side: str, size: str, folder: Path, attention: str | None) -> dict[str, float]:
    """In a process of its own: the median step, and for ours the medians of its metrics."""
    _, batch, length, checkpointing = SIZES[size]
    rows = make_rows(folder / "rows.jsonl", [length] * ROWS)
    model = folder / size
    if side == "bare":
        batches = [padded(rows[i : i + batch]) for i in range(0, ROWS, batch)]
        bare = BareBf16(model, batches, attention or "sdpa", checkpointing)
        seconds = [bare.step() for _ in range(WARM_UP + STEPS)][WARM_UP:]
        return {"seconds": statistics.median(seconds)}
    policy = {
        "batch_size": batch,
        "micro_batch_tokens": batch * length,
        "activation_checkpointing": checkpointing,
    }
    home = Path(tempfile.mkdtemp(dir=folder))
    trainer = make_trainer(home, model, folder / "rows.jsonl", on_gpu=True, attention=attention, **policy)
    ours = Ours(trainer)
    seen: list[dict[str, float]] = []
    for _ in range(WARM_UP + STEPS):
        seconds_ = ours.step()
        seen.append({**ours.metrics, "seconds": seconds_})
    names = ["seconds", "train/mfu", "train/tokens_per_s"]
    names += [name for name in seen[-1] if name.startswith("time/")]
    return {
        n: statistics.median(row[n] for row in seen[WARM_UP:] if n in row) for n in names if n in seen[-1]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="0.6b,7b")
    parser.add_argument(
        "--attention", default=None, help="sdpa, flash_attention_2, ...; default: each side's own"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("sft_gpu measures on a GPU, and torch sees none here (torch.cuda.is_available() is false)")
        return
    if options.side:
        print(json.dumps(run_side(options.side, options.sizes, options.folder, options.attention)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes.split(","):
            measure(size, Path(folder), options.attention)


def measure(size: str, folder: Path, attention: str | None) -> None:
    import transformers

    config = transformers.Qwen3Config(**SHAPE, **SIZES[size][0])
    parameters = save_model(folder / size, config, torch.bfloat16)
    command = [sys.executable, "-m", "benchmarks.sft_gpu", "--sizes", size, "--folder", str(folder)]
    command += ["--attention", attention] if attention else []
    found = []
    for side in ("bare", "ours", "bare"):
        done = subprocess.run([*command, "--side", side], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{side} at {size} failed:\n{done.stderr[-3000:]}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(size, side, found[-1])
    first, ours, second = found
    bare = (first["seconds"] + second["seconds"]) / 2
    report(
        f"sft_gpu_{size}", [ours["seconds"] / bare], goal=1.02, better="lower",
        aa=first["seconds"] / second["seconds"], parameters=parameters, gpu=torch.cuda.get_device_name(),
        ours=ours, bare_s=bare,
    )  # fmt: skip


if __name__ == "__main__":
    main()
