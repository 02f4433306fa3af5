"""`hpc-rl export`: safetensors out of a checkpoint on disk, without any GPU or the run's processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpc_rl.checkpoint.export import Export, ExportError, write_now
from hpc_rl.checkpoint.export_parts import Source
from hpc_rl.checkpoint.loader import load_into, tensors_of
from hpc_rl.models.hf.file_weights import FileWeights
from hpc_rl.models.hf.folder import model_folder
from hpc_rl.models.hf.model import HfModel, skeleton
from hpc_rl.recipe.schema import Recipe
from hpc_rl.run.paths import RunDir
from hpc_rl.run.settings import load_run


class CheckpointTensors:
    """Full tensors of a `policy/` folder by name in memory: the average of a parameter where there is one,
    else the parameter, else (it was not trained) what the model's files have."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self._saved = set(tensors_of(folder))
        self._files: FileWeights | None = None
        self._model = recipe.model

    def saved(self, name: str) -> str | None:
        """The name in the checkpoint, or None."""
        return next((key for key in (f"ema.{name}", f"model.{name}") if key in self._saved), None)

    def read(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in unit.items()}
        keys = {name: self.saved(name) for name in unit}
        load_into(self.folder, {key: values[name] for name, key in keys.items() if key is not None})
        rest = {name: values[name] for name, key in keys.items() if key is None}
        if rest:
            self._files = self._files or FileWeights(self._model)
            self._files.fill(rest)
        return values


class CheckpointModel(HfModel):
    """An export's source that reads its tensors from a checkpoint, one layer at a time."""

    tensors: CheckpointTensors

    def current(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.tensors.read(unit)


def export_checkpoint(run_dir: RunDir, step: int | None, out: Path, *, merged: bool = False) -> Path:
    """Write the weights of the checkpoint of `step` (None: the newest complete one) to the folder `out`;
    with `merged` a whole model also where the run exports adapters alone.

    Raises ExportError when there is no such complete checkpoint or `out` exists already.
    """
    complete = run_dir.complete_steps()
    if step is None and complete:
        step = complete[-1]
    if step is None or step not in complete:
        there = ", ".join(map(str, complete)) or "none"
        wanted = "" if step is None else f" of step {step}"
        raise ExportError(f"{run_dir.root} has no complete checkpoint{wanted}; complete steps: {there}")
    if out.exists():
        raise ExportError(f"{out} exists already; choose another folder")
    recipe = load_run(run_dir)
    if merged and recipe.model.lora is not None:
        recipe.model.lora.export = "merged"
    tensors = CheckpointTensors(run_dir.checkpoint(step) / "policy", recipe)
    source, export = _prepare(recipe, tensors, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_now(source, export, out.with_name(f".{out.name}.{os.getpid()}.partial"))


def _prepare(recipe: Recipe, tensors: CheckpointTensors, out: Path) -> tuple[Source, Export]:
    module, folder = skeleton(recipe.model)
    dtype = getattr(torch, recipe.model.dtype)
    tokenizer = model_folder(recipe.model.tokenizer) if recipe.model.tokenizer is not None else None
    options: dict[str, Any] = {}
    source: Source
    if recipe.model.lora is None:
        model = CheckpointModel(module, folder, dtype, sharded=False)
        model.tensors = tensors
        source = model
    else:
        from hpc_rl.models.hf.adapted import StoredAdaptedModel, adapter_export

        adapted = StoredAdaptedModel(module, folder, dtype, sharded=False)
        adapted.read = tensors.read
        source, options["also"] = adapter_export(adapted, recipe.model.lora)
    return source, Export(out, folder, tokenizer, dtype, **options)
