"""Exports of the policy's weights that are under way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.bus.messages import ModelExported
from hpc_rl.checkpoint.export import Export, ExportError
from hpc_rl.models.hf.folder import model_folder
from hpc_rl.models.hf.model import HfModel
from hpc_rl.recipe.schema import Model

EXPORT_LIMIT_S = 1800.0


@dataclass
class _Running:
    step: int
    label: str
    began: float
    export: Export


class Exports:
    """Gathering is collective and done when `start` returns; writing goes on in rank 0's background."""

    def __init__(self, spec: Model, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self._running: list[_Running] = []

    def start(self, model: HfModel, step: int, label: str, folder: Path) -> None:
        """Write safetensors of `model`'s weights to `folder`. A collective."""
        began = time.monotonic()
        if self.rank != 0:
            for _ in model.buckets(512 << 20):
                pass
            return
        tokenizer = model_folder(self.spec.tokenizer) if self.spec.tokenizer is not None else None
        export = Export(folder, model.folder, tokenizer, model.file_dtype)
        export.feed(model)
        self._running.append(_Running(step, label, began, export))

    def ended(self, wait_s: float = 0.0) -> Iterator[ModelExported]:
        """Those that are done; with `wait_s` all of them, each waited for that long at most."""
        for entry in [entry for entry in self._running if wait_s > 0 or entry.export.done]:
            self._running.remove(entry)
            yield _result(entry, wait_s)


def _result(entry: _Running, wait_s: float) -> ModelExported:
    try:
        path, error = str(entry.export.join(wait_s)), ""
    except ExportError as failed:
        path, error = str(entry.export.target), str(failed)
    return ModelExported(entry.step, entry.label, path, time.monotonic() - entry.began, error)
