"""The folder of an export: file headers, config, tokenizer and processor files, and its publication."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from hpc_rl.checkpoint.export_files import Plan, PlannedFile
from hpc_rl.checkpoint.layout import sync_folder

# What goes along with the weights: everything that describes the model, its words and its sampling.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "*.model",
    "*processor_config.json",
    "*.py",
    "LICENSE*",
)
INDEX = "model.safetensors.index.json"


def write_header(folder: Path, file: PlannedFile) -> None:
    """Give the file its header and its size. Others may have written tensors to it already."""
    handle = os.open(folder / file.name, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, file.header, 0)
        os.ftruncate(handle, file.nbytes)
    finally:
        os.close(handle)


def describe(folder: Path, plan: Plan, model: Path, tokenizer: Path | None, dtype: torch.dtype) -> None:
    """Put the index, config.json and the companions of `model` (and `tokenizer`) beside the weights."""
    if plan.index is not None:
        (folder / INDEX).write_text(plan.index)
    if plan.files:  # an adapter alone finds its model by its own config
        config = json.loads((model / "config.json").read_text())
        config.pop("quantization_config", None)  # what was in four bits is written as plain tensors
        _set_dtype(config, str(dtype).removeprefix("torch."))
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    for source in (model, tokenizer):
        for pattern in COMPANIONS if source is not None else ():
            for path in source.glob(pattern):  # type: ignore[union-attr]
                if path.is_dir():
                    shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(path, folder / path.name)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """The dtype of the files, here and in the configs of the parts (text, vision) that name theirs."""
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    for part in config.values():
        if isinstance(part, dict) and ("dtype" in part or "torch_dtype" in part):
            _set_dtype(part, dtype)


def publish(folder: Path, target: Path) -> None:
    """Sync everything in `folder` and give it its name at once. What earlier starts left goes."""
    for parent, _, files in os.walk(folder):
        for name in files:
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(parent))
    old = folder.with_suffix(".old")
    if target.exists():  # of an attempt that was rolled back
        os.replace(target, old)
    os.replace(folder, target)
    sync_folder(target.parent)
    for left in target.parent.glob(f".{target.name}.*"):
        if left.suffix in (".partial", ".old"):
            shutil.rmtree(left, ignore_errors=True)
