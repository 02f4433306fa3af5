"""`hpc-rl export`: safetensors out of a checkpoint on disk, without any GPU or the run's processes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from hpc_rl.checkpoint.export import Export, ExportError, write_now
from hpc_rl.checkpoint.loader import load_into
from hpc_rl.models.hf.folder import model_folder
from hpc_rl.models.hf.model import HfModel, skeleton
from hpc_rl.run.paths import RunDir
from hpc_rl.run.settings import load_run


class CheckpointModel(HfModel):
    """An export's source that reads its tensors from a `policy/` checkpoint, one layer at a time."""

    checkpoint: Path

    def current(self, unit: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {f"model.{name}": torch.empty(t.shape, dtype=t.dtype) for name, t in unit.items()}
        load_into(self.checkpoint, values)
        return {name: values[f"model.{name}"] for name in unit}


def export_checkpoint(run_dir: RunDir, step: int | None, out: Path) -> Path:
    """Write the weights of the checkpoint of `step` (None: the newest complete one) to the folder `out`.

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
    module, folder = skeleton(recipe.model)
    source = CheckpointModel(module, folder, getattr(torch, recipe.model.dtype), sharded=False)
    source.checkpoint = run_dir.checkpoint(step) / "policy"
    tokenizer = model_folder(recipe.model.tokenizer) if recipe.model.tokenizer is not None else None
    out.parent.mkdir(parents=True, exist_ok=True)
    export = Export(out, folder, tokenizer, source.file_dtype)
    return write_now(source, export, out.with_name(f".{out.name}.{os.getpid()}.partial"))
