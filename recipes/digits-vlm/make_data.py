"""Write scikit-learn's handwritten digits (1797 scans, real images) as PNG files in LLaVA format.

Usage: python make_data.py FOLDER [--seed 0]
Writes FOLDER/train.json, FOLDER/eval.json (one in six, never trained on) and FOLDER/images/*.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

QUESTION = "<image>\nWhich digit?"
SIZE = 32  # the scans have 8 x 8 pixels


def rows(
    folder: Path, indices: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> list[dict[str, object]]:
    """Save the images and describe each as LLaVA does; paths are relative to the annotations."""
    found: list[dict[str, object]] = []
    for index in sorted(int(i) for i in indices):
        name = f"images/{index:04d}.png"
        scan = Image.fromarray((images[index] * 255 / 16).astype(np.uint8))
        scan.resize((SIZE, SIZE), Image.Resampling.NEAREST).save(folder / name)
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": str(labels[index])}]
        found.append({"id": f"{index:04d}", "image": name, "conversations": turns})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    order = np.random.default_rng(arguments.seed).permutation(len(digits.target))
    held_out = len(order) // 6
    for name, part in (("eval", order[:held_out]), ("train", order[held_out:])):
        found = rows(folder, part, digits.images, digits.target)
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{folder / name}.json: {len(found)} rows")


if __name__ == "__main__":
    main()
