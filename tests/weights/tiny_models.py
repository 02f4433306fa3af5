"""Tiny checkpoints and weight sources for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

VOCAB = 512
EOS = 1


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0`...; `<bos>` 0, `<eos>` 1, `<pad>` 2."""
    words = ["<bos>", "<eos>", "<pad>", "<unk>"] + [f"w{i}" for i in range(VOCAB - 4)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def tiny_checkpoint(folder: Path, seed: int, *, tied: bool = True, family: str = "qwen3") -> Path:
    """A random fp32 model of 2 layers, hidden 128, as `save_pretrained` writes it."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        bos_token_id=0,
        initializer_range=0.04,
    )
    config = Qwen3Config(head_dim=64, **shape) if family == "qwen3" else Qwen2Config(**shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class FileSource:
    """A `WeightSource` over a checkpoint folder, one bucket per layer."""

    def __init__(self, folder: Path) -> None:
        self.tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.tensors.update(load_file(file))

    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in self.tensors.items():
            layer = name.split(".")[2] if ".layers." in name else "rest"
            groups.setdefault(layer, []).append((name, tensor))
        yield from groups.values()
