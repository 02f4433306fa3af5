"""Which tensors a checkpoint folder holds, from its safetensors headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

INDEX = "model.safetensors.index.json"


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder of `model`: itself if it is one, else its snapshot in the Hub cache (no network)."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))


def checkpoint_names(folder: Path) -> frozenset[str] | None:
    """The tensor names of all safetensors files of `folder`; None where it has none."""
    index = folder / INDEX
    if index.is_file():
        return frozenset(json.loads(index.read_text())["weight_map"])
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    return frozenset(name for file in files for name in _header(file))


def tied_names(folder: Path) -> frozenset[str]:
    """Names that may be in the file or not, because they repeat the input embedding."""
    config = json.loads((folder / "config.json").read_text())
    nested = config.get("text_config") or {}
    if config.get("tie_word_embeddings", nested.get("tie_word_embeddings", False)):
        return frozenset({"lm_head.weight", "language_model.lm_head.weight"})
    return frozenset()


def _header(file: Path) -> list[str]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        names = json.loads(stream.read(length))
    return [name for name in names if name != "__metadata__"]
