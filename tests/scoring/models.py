"""Tiny models that score: a classifier with a chat template of its own, a causal model of the same words."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as T

from tests.families import FAMILIES
from tests.tiny_models import EOS, VOCAB, save_model, word_tokenizer

# Words are whole tokens: w11 to w13 say who speaks, and w11 ends a message as well.
CHAT = (
    "{% for m in messages %}w1{{ {'system': 1, 'user': 2, 'assistant': 3}[m['role']] }} {{ m['content'] }} "
    "w11 {% endfor %}{% if add_generation_prompt %}w13 {% endif %}"
)


def save_classifier(
    folder: Path, seed: int = 0, *, family: str = "qwen3", pad: int | None = None, labels: int = 1
) -> Path:
    """A random fp32 sequence classifier over the words of `word_tokenizer`, with a chat template."""
    torch.manual_seed(seed)
    config = FAMILIES[family].config()
    config.vocab_size, config.eos_token_id, config.bos_token_id = VOCAB, EOS, 0
    config.num_labels, config.pad_token_id, config.initializer_range = labels, pad, 0.2
    T.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def save_causal(folder: Path, seed: int = 0, *, chat: bool = True) -> Path:
    """A random fp32 causal model over the same words, spread enough that greedy replies differ."""
    shape = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": 0, "initializer_range": 0.2}
    save_model(folder, "qwen3", seed, **shape)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(folder)
    return folder
