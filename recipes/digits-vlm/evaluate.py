"""Held-out accuracy of a model that `sft.yaml` trained: plain Transformers, greedy answers.

Usage: python evaluate.py MODEL DATA/eval.json
Prints `accuracy 0.953 (299 images)`; the model must write the digit and then stop.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.no_grad()
def accuracy(model_folder: Path, annotations: Path, batch: int = 64) -> tuple[float, int]:
    """`(share of right answers, number of images)`."""
    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = json.loads(annotations.read_text(encoding="utf-8"))
    right = 0
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        texts, images = [], []
        for row in part:
            question = row["conversations"][0]["value"].removeprefix("<image>\n")
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            texts.append(processor.apply_chat_template(chat, add_generation_prompt=True))
            images.append([Image.open(annotations.parent / row["image"]).convert("RGB")])
        inputs = processor(text=texts, images=images, return_tensors="pt")  # equally long: nothing is padded
        made = model.generate(**inputs, max_new_tokens=2, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for row, tokens in zip(part, made, strict=True):
            answer = processor.tokenizer.decode(tokens)
            right += answer == row["conversations"][1]["value"] + processor.tokenizer.eos_token
    return right / len(rows), len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("annotations", type=Path)
    arguments = parser.parse_args()
    share, images = accuracy(arguments.model, arguments.annotations)
    print(f"accuracy {share:.3f} ({images} images)")


if __name__ == "__main__":
    main()
