"""Exports of the policy's weights that are under way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpc_rl.bus.messages import ModelExported
from hpc_rl.checkpoint.export import Export, Exporter, ExportError, Source
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
    """Every rank copies and writes its own rows; rank 0 reports. `token` names this start of the ranks."""

    def __init__(self, spec: Model, rank: int, world_size: int, token: str) -> None:
        self.spec, self.rank = spec, rank
        self._exporter = Exporter(rank, world_size, token, EXPORT_LIMIT_S)
        self._running: list[_Running] = []

    def start(self, model: HfModel, step: int, label: str, folder: Path) -> None:
        """Stage `model`'s weights; they are written to `folder` in the background. All ranks call it in
        the same order: what is not sharded by rows is gathered here."""
        began = time.monotonic()
        tokenizer = model_folder(self.spec.tokenizer) if self.spec.tokenizer is not None else None
        source: Source = model
        also = None
        if self.spec.lora is not None:
            from hpc_rl.models.hf.adapted import AdaptedModel, adapter_export

            assert isinstance(model, AdaptedModel)
            source, also = adapter_export(model, self.spec.lora)
        export = Export(folder, model.folder, tokenizer, model.file_dtype, also)
        self._running.append(_Running(step, label, began, self._exporter.stage(source, export)))

    def ended(self, wait_s: float = 0.0) -> Iterator[ModelExported]:
        """Those that are done; with `wait_s` all of them, each waited for that long at most. On ranks
        other than 0 it only waits: rank 0 knows of their failures."""
        for entry in [entry for entry in self._running if wait_s > 0 or entry.export.done]:
            self._running.remove(entry)
            result = _result(entry, wait_s)
            if self.rank == 0:
                yield result

    def close(self) -> None:
        self._exporter.close()


def _result(entry: _Running, wait_s: float) -> ModelExported:
    try:
        path, error = str(entry.export.join(wait_s)), ""
    except ExportError as failed:
        path, error = str(entry.export.target), str(failed)
    return ModelExported(entry.step, entry.label, path, time.monotonic() - entry.began, error)
