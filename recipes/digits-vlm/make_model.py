"""Make a tiny LLaVA (a CLIP tower of two layers before a Qwen2 of two) with random weights, its tokenizer
of single characters and its processor: `sft.yaml` teaches it to read digits on two CPU cores.

Usage: python make_model.py FOLDER [--seed 0]
"""

from __future__ import annotations

import argparse
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

PAD, EOS, IMAGE, USER, ASSISTANT = "<pad>", "<eos>", "<image>", "<user>", "<assistant>"
SIZE, PATCH = 32, 8
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_processor() -> LlavaProcessor:
    """One token per printable character; images of SIZE x SIZE pixels become (SIZE / PATCH)² tokens."""
    special = [PAD, EOS, IMAGE, USER, ASSISTANT]
    vocabulary = {token: index for index, token in enumerate([*special, *string.printable])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
    )  # fmt: skip
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(size=size, crop_size=size, resample=0, do_center_crop=False)
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def make_model(seed: int, vocab_size: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        image_size=SIZE, patch_size=PATCH, projection_dim=128, initializer_factor=2.0,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False, initializer_range=0.04, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=2, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(SIZE // PATCH) ** 2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).to(torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    processor = make_processor()
    model = make_model(arguments.seed, len(processor.tokenizer))
    model.generation_config.eos_token_id = 1
    model.save_pretrained(arguments.folder)
    processor.save_pretrained(arguments.folder)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.folder}: {size:,} parameters, {len(processor.tokenizer)} tokens")


if __name__ == "__main__":
    main()
