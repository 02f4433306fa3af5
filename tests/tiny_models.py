"""Tiny random models of several families, saved as a user would have them (shared by the torch tests)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as T
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from tests.families import FAMILIES


def save_model(folder: Path, family: str = "qwen2", seed: int = 0, **changes: Any) -> Path:
    """Save a random model (fp32) to `folder` and return it."""
    torch.manual_seed(seed)
    config = FAMILIES[family].config()
    for key, value in changes.items():
        setattr(config, key, value)
    auto = T.AutoModelForImageTextToText if FAMILIES[family].vision else T.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    if config.eos_token_id is not None:
        model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    return folder


def character_tokenizer(
    characters: Iterable[str], *special: str, extra: dict[str, str] | None = None
) -> T.PreTrainedTokenizerFast:
    """One token per character, after the special tokens, of which `<eos>` and `<pad>` must be two;
    then those of `extra` (role -> token)."""
    extra = extra or {}
    vocabulary = {token: index for index, token in enumerate([*special, *extra.values(), *characters])}
    unknown = "<unk>" if "<unk>" in special else "<pad>"
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    roles = {f"{name.strip('<>')}_token": name for name in special}
    return T.PreTrainedTokenizerFast(tokenizer_object=core, **roles, extra_special_tokens=extra)


def save_tokenizer(folder: Path) -> Path:
    """A character-level tokenizer: <pad> 0, <eos> 1, then printable ASCII characters."""
    character_tokenizer(map(chr, range(32, 126)), "<pad>", "<eos>").save_pretrained(folder)
    return folder


# --- checkpoints for the engines and weight transports ------------------------------------------------
VOCAB, EOS = 512, 1


def word_tokenizer() -> T.PreTrainedTokenizerFast:
    """Words `w0`...; `<bos>` 0, `<eos>` 1, `<pad>` 2, `<unk>` 3."""
    special = ["<bos>", "<eos>", "<pad>", "<unk>"]
    words = [*special, *(f"w{i}" for i in range(VOCAB - len(special)))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name.strip('<>')}_token": name for name in special}
    return T.PreTrainedTokenizerFast(tokenizer_object=core, **names)


def save_checkpoint(folder: Path, seed: int, *, family: str = "qwen3", **changes: Any) -> Path:
    """A random fp32 model with a vocabulary of VOCAB words, and its tokenizer."""
    shape = {"vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": 0, "initializer_range": 0.04}
    save_model(folder, family, seed, **shape, **changes)
    word_tokenizer().save_pretrained(folder)
    return folder


class FileSource:
    """A `WeightSource` over a checkpoint folder, one bucket per layer."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.tensors.update(load_file(file))

    def buckets(self, max_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        groups: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in self.tensors.items():
            layer = name.split(".")[2] if ".layers." in name else "rest"
            groups.setdefault(layer, []).append((name, tensor))
        yield from groups.values()
