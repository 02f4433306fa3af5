"""Tiny random models of several families, saved as a user would have them (shared by the torch tests)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as T

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, Any] = {
    "llama": lambda: T.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": lambda: T.MistralConfig(**SIZES),
    "qwen2": lambda: T.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: T.Qwen3Config(**SIZES),
    "gemma2": lambda: T.Gemma2Config(**SIZES, sliding_window=16),
    "gemma3": lambda: T.Gemma3TextConfig(**SIZES, sliding_window=16),
    "phi3": lambda: T.Phi3Config(**SIZES, pad_token_id=0),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**SIZES, **MOE),
    "mixtral": lambda: T.MixtralConfig(**SIZES, num_local_experts=4),
    "gpt_oss": lambda: T.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
}


def save_model(folder: Path, family: str = "qwen2", seed: int = 0, **changes: Any) -> Path:
    """Save a random model (fp32) to `folder` and return it."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = T.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path) -> Path:
    """A character-level tokenizer: <pad> 0, <eos> 1, then printable ASCII characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = ["<pad>", "<eos>", *(chr(c) for c in range(32, 126))]
    vocabulary = {c: i for i, c in enumerate(characters)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    T.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder
    )
    return folder
