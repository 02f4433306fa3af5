"""The weights of a model's files by the names in memory, a layer at a time, without the model."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor

from hpc_rl.models.base import ModelError
from hpc_rl.models.hf.classes import build_on_meta
from hpc_rl.models.hf.conversion import transforms_of
from hpc_rl.models.hf.folder import model_folder, weight_files
from hpc_rl.models.hf.loading import fill, plan_of, realised
from hpc_rl.models.hf.reading import Reader
from hpc_rl.recipe.schema import Model


class FileWeights:
    """Reads what a checkpoint leaves out: weights that are not trained."""

    def __init__(self, spec: Model) -> None:
        folder = model_folder(spec.path, spec.revision)
        files = weight_files(folder)
        self._module, _ = build_on_meta(folder, spec)
        names = self._module.state_dict(keep_vars=True)
        self._plan, _ = plan_of(self._module, files, transforms_of(self._module), names)
        self._reader = Reader(files)

    def fill(self, targets: dict[str, Tensor]) -> None:
        """Fill full tensors of one layer, by name in memory. What one conversion makes together is of
        one layer. Raises ModelError if one is not in the files."""
        filled = set()
        for first, mapping in self._plan.items():
            if first in targets:
                # A conversion uses up its sources.
                for name, source in realised(self._module, self._reader, first, deepcopy(mapping)):
                    if name in targets:
                        fill(targets[name], source, name)
                        filled.add(name)
        missing = sorted(set(targets) - filled)
        if missing:
            raise ModelError(f"{', '.join(missing[:5])} is not in the safetensors files of the model")
