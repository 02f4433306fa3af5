"""Processors of the tiny vision-language models: a character tokenizer with their special tokens, and the
real image processors for images of 28 x 28 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.families import FAMILIES
from tests.tiny_models import character_tokenizer

SPECIAL = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_start_token": "<vision>",
    "vision_end_token": "</vision>",
    "boi_token": "<img>",
    "eoi_token": "</img>",
}
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE"
    "{% elif part['type'] == 'video' %}<vision><video></vision>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# What stands for an image in a prompt.
PLACE = {
    "gemma3_vlm": "<img>",
    "llava": "<image>",
    "mllama": "<image>",
    "qwen2_vl": "<vision><image></vision>",
    "qwen2_5_vl": "<vision><image></vision>",
    "qwen3_vl": "<vision><image></vision>",
}


def tokenizer() -> T.PreTrainedTokenizerFast:
    """The ids of `families.PAD`...: <pad> <eos> <bos>, the tokens of images, line ends, then ASCII."""
    lines = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]
    words = [*lines, "<user>", "<assistant>", "<system>"]
    made = character_tokenizer([*words, *map(chr, range(32, 126))], "<pad>", "<eos>", "<bos>", extra=SPECIAL)
    made.add_tokens(words[1:])
    return made


def processor(family: str) -> Any:
    """The processor of a tiny model of `family`."""
    words, size = tokenizer(), {"height": 28, "width": 28}
    chat = CHAT.replace("IMAGE", PLACE[family])
    if family == "gemma3_vlm":
        images = T.Gemma3ImageProcessor(size=size, do_pan_and_scan=False)
        return T.Gemma3Processor(images, words, chat_template=chat, image_seq_length=4)
    if family == "llava":
        images = T.CLIPImageProcessor(size=size, crop_size=size)
        return T.LlavaProcessor(
            images, words, patch_size=7, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=chat,
        )  # fmt: skip
    if family == "mllama":
        images = T.MllamaImageProcessor(size=size, max_image_tiles=2)
        return T.MllamaProcessor(images, words, chat_template=chat)
    pixels = {"shortest_edge": 14 * 14, "longest_edge": 56 * 56}
    images = T.Qwen2VLImageProcessor(patch_size=7, temporal_patch_size=2, merge_size=2, size=pixels)
    if family == "qwen3_vl":
        videos = T.Qwen3VLVideoProcessor(patch_size=7, temporal_patch_size=2, merge_size=2)
        return T.Qwen3VLProcessor(images, words, videos, chat_template=chat)
    videos = T.Qwen2VLVideoProcessor(patch_size=7, temporal_patch_size=2, merge_size=2)
    cls = T.Qwen2VLProcessor if family == "qwen2_vl" else T.Qwen2_5_VLProcessor
    return cls(images, words, videos, chat_template=chat)


def picture(seed: int, width: int = 28, height: int = 28) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(
    made: Any, family: str, text: str, *images: Image.Image
) -> tuple[list[int], dict[str, Any] | None]:
    """`(token ids, media)` of `text`, in which `@` stands for an image."""
    whole = text.replace("@", PLACE[family])
    output = made(text=[whole], images=[list(images)] if images else None, return_tensors="pt")
    ids = output.pop("input_ids")[0].tolist()
    output.pop("attention_mask", None)
    return ids, ({k: torch.as_tensor(v) for k, v in output.items()} if images else None)


def save_vlm(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """A random model of `family` (fp32) with its processor."""
    torch.manual_seed(seed)
    config = FAMILIES[family].config(**changes)
    model = T.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    _wake(model)
    model.save_pretrained(folder)
    if family in ("gemma3_vlm", "llava"):
        _name_as_on_the_hub(folder / "model.safetensors")
    processor(family).save_pretrained(folder)
    return folder


def _name_as_on_the_hub(file: Path) -> None:
    """Published checkpoints say `vision_tower.vision_model.`, and so do models that were loaded from one;
    a model made from its config alone leaves it out, and vLLM does not take that."""
    tensors = load_file(file)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})


@torch.no_grad()
def _wake(model: Any) -> None:
    """Gates that start at zero would hide everything behind them."""
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.numel() == 1:
            parameter.fill_(0.7)
